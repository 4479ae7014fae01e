"""Qwen3 (arXiv 2505.09388): RMSNorm on each head of q and k, no biases by default."""

from __future__ import annotations

from headrace.models.family import Family, Traits, everywhere, full_attention
from headrace.models.fields import Fields
from headrace.models.qwen2 import qwen_windows


def _from_hf(config: Fields, layers: int) -> Traits:
    attention_bias = config.flag("attention_bias", False)
    return Traits(
        windows=qwen_windows(config, layers),
        rope_layers=everywhere(layers),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )


def _from_gguf(metadata: Fields, layers: int) -> Traits:
    return Traits(windows=full_attention(layers), rope_layers=everywhere(layers), qk_norm=True)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_architecture="qwen3",
    traits_from_hf=_from_hf,
    traits_from_gguf=_from_gguf,
)
