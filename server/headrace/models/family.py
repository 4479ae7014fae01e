"""Family: what tells one architecture family from another. Imports no torch.

Every family here is a pre-norm decoder of grouped-query attention and a gated MLP; `Traits` is all
that they differ in, and a family's file says how its configuration spells them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.errors import CheckpointError
from headrace.models.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """The structure of a checkpoint beyond its sizes."""

    windows: tuple[int | None, ...]
    """For each layer: tokens it attends to, itself included; None for all."""
    rope_layers: tuple[bool, ...]
    """For each layer: whether it has rotary embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture family: its names, its defaults, and how its traits are read."""

    name: str
    """Hugging Face's model_type."""
    architectures: tuple[str, ...]
    gguf_architecture: str | None
    """general.architecture of its GGUF files; None if they go by another family's name."""
    traits_from_hf: Callable[[Fields, int], Traits]
    """(config.json, layers) -> traits."""
    traits_from_gguf: Callable[[Fields, int], Traits] | None = None
    """(metadata below the architecture's prefix, layers) -> traits."""
    default_rope_theta: float = 10_000.0
    default_tied: bool = False


def everywhere(layers: int) -> tuple[bool, ...]:
    return (True,) * layers


def full_attention(layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def sliding_window(config: Fields, default: int) -> int | None:
    """The window's size; null means none, and `default` holds if the config does not say."""
    if config.has_key("sliding_window"):
        return config.optional_integer("sliding_window")
    return default


def windows_by_layer_type(
    config: Fields, window: int | None, default: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """Windows from `layer_types`, or where `default` says so if the config does not list them.

    `window` is None if the configuration turns sliding windows off.
    """
    sliding = default
    if names := config.sequence("layer_types", len(default), str):
        known = ("full_attention", "sliding_attention")
        if unknown := sorted(set(names) - set(known)):
            raise CheckpointError(
                f"{config.source}: 'layer_types' names {', '.join(unknown)}; known are "
                f"{' and '.join(known)}."
            )
        sliding = tuple(name == "sliding_attention" for name in names)
    return tuple(window if is_sliding else None for is_sliding in sliding)
