"""Llama 2, 3, 3.1 to 3.3 (arXiv 2307.09288, 2407.21783), SmolLM2 and others of the same shape."""

from __future__ import annotations

from headrace.models.family import Family, Traits, everywhere, full_attention
from headrace.models.fields import Fields


def _from_hf(config: Fields, layers: int) -> Traits:
    attention_bias = config.flag("attention_bias", False)
    return Traits(
        windows=full_attention(layers),
        rope_layers=everywhere(layers),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _from_gguf(metadata: Fields, layers: int) -> Traits:
    # Mistral's files go by this architecture too.
    window = metadata.optional_integer("attention.sliding_window")
    return Traits(windows=(window,) * layers, rope_layers=everywhere(layers))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf_architecture="llama",
    traits_from_hf=_from_hf,
    traits_from_gguf=_from_gguf,
)
