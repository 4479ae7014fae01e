"""Mistral (arXiv 2310.06825): Llama's shape, with one sliding window for all layers."""

from __future__ import annotations

from headrace.models.family import Family, Traits, everywhere, sliding_window
from headrace.models.fields import Fields

DEFAULT_WINDOW = 4096


def _from_hf(config: Fields, layers: int) -> Traits:
    window = sliding_window(config, DEFAULT_WINDOW)
    return Traits(windows=(window,) * layers, rope_layers=everywhere(layers))


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf_architecture=None,
    traits_from_hf=_from_hf,
)
