"""SmolLM3: Llama's shape; every fourth layer has no rotary embedding (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from headrace.models.family import (
    Family,
    Traits,
    full_attention,
    windows_by_layer_type,
)
from headrace.models.fields import Fields

NO_ROPE_INTERVAL = 4


def _rope_layers(layers: int, interval: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % interval != 0 for layer in range(layers))


def _from_hf(config: Fields, layers: int) -> Traits:
    interval = config.integer("no_rope_layer_interval", NO_ROPE_INTERVAL)
    rope_layers = _rope_layers(layers, interval)
    # Despite its name, the key says 1 where a layer has rotary embedding.
    if listed := config.sequence("no_rope_layers", layers, int):
        rope_layers = tuple(bool(has_rope) for has_rope in listed)
    window = None
    if config.flag("use_sliding_window", False):
        window = config.optional_integer("sliding_window")
    attention_bias = config.flag("attention_bias", False)
    return Traits(
        windows=windows_by_layer_type(config, window, tuple(not rope for rope in rope_layers)),
        rope_layers=rope_layers,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _from_gguf(metadata: Fields, layers: int) -> Traits:
    return Traits(
        windows=full_attention(layers), rope_layers=_rope_layers(layers, NO_ROPE_INTERVAL)
    )


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    gguf_architecture="smollm3",
    traits_from_hf=_from_hf,
    traits_from_gguf=_from_gguf,
    default_rope_theta=2_000_000.0,
    default_tied=True,
)
