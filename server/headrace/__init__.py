"""Headrace: an LLM inference server. `LLM` and `SamplingParams` are its Python interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.llm import LLM
    from headrace.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # PEP 562: `import headrace` costs nothing; torch is loaded when LLM is asked for.
    if name == "LLM":
        from headrace.llm import LLM

        return LLM
    if name == "SamplingParams":
        from headrace.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
