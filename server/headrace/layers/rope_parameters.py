"""RopeParameters: what a checkpoint says of its rotary embedding. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Rotary embedding and its context extension, with Hugging Face's names and meanings."""

    rope_type: str = "default"
    """One of ROPE_TYPES."""
    rope_theta: float
    rotary_dim: int
    """Values of each head that are rotated, the first ones; even."""
    max_position_embeddings: int
    """The model's context length, extension included."""
    original_max_position_embeddings: int
    """The context length before the extension."""
    factor: float | None = None
    attention_factor: float | None = None
    """Factor on cos and sin (yarn, longrope); None: the default of the method's paper."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    frequency_factors: tuple[float, ...] = ()
    """Divisors of the frequencies, one a pair, where a GGUF file stores them worked out."""
