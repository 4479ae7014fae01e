"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama's shape with biases on q, k and v."""

from __future__ import annotations

from headrace.models.family import (
    Family,
    Traits,
    everywhere,
    full_attention,
    sliding_window,
    windows_by_layer_type,
)
from headrace.models.fields import Fields

DEFAULT_WINDOW = 4096
FIRST_WINDOW_LAYER = 28
"""Default of max_window_layers: layers from there on have the window, if it is turned on."""


def qwen_windows(config: Fields, layers: int) -> tuple[int | None, ...]:
    """Sliding windows of Qwen2 and Qwen3: off unless `use_sliding_window`."""
    if not config.flag("use_sliding_window", False):
        return full_attention(layers)
    first = config.integer("max_window_layers", FIRST_WINDOW_LAYER, minimum=0)
    window = sliding_window(config, DEFAULT_WINDOW)
    return windows_by_layer_type(config, window, tuple(i >= first for i in range(layers)))


def _from_hf(config: Fields, layers: int) -> Traits:
    return Traits(
        windows=qwen_windows(config, layers), rope_layers=everywhere(layers), qkv_bias=True
    )


def _from_gguf(metadata: Fields, layers: int) -> Traits:
    return Traits(windows=full_attention(layers), rope_layers=everywhere(layers), qkv_bias=True)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf_architecture="qwen2",
    traits_from_hf=_from_hf,
    traits_from_gguf=_from_gguf,
)
