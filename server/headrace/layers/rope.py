"""The table of cos and sin of every position, for each way of extending a context.

Angles are fp32, as in the reference implementations that the models were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headrace.layers.rope_parameters import RopeParameters


def cos_sin_table(rope: RopeParameters, max_positions: int, device: torch.device) -> Tensor:
    """[max_positions, 2, rotary_dim / 2] fp32: cos, then sin, of position * frequency.

    The two methods whose frequencies depend on the length of the context (dynamic, longrope) take
    it to be `max_positions`: one table for all requests, so that a cached key never goes stale and
    no request depends on how long another one is.
    """
    frequencies, scale = _METHODS[rope.rope_type](rope, max_positions)
    if rope.frequency_factors:
        frequencies = frequencies / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return (torch.stack((angles.cos(), angles.sin()), dim=1) * scale).to(device)


def no_rope_table(max_positions: int, device: torch.device) -> Tensor:
    """The table of a layer without rotary embedding: no pair of values is rotated."""
    return torch.empty((max_positions, 2, 0), device=device)


def _exponents(rope: RopeParameters) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim


def _default(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """Su et al., arXiv 2104.09864."""
    return 1.0 / rope.rope_theta ** _exponents(rope), 1.0


def _linear(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """Position interpolation: Chen et al., arXiv 2306.15595."""
    return _default(rope, max_positions)[0] / _factor(rope), 1.0


def _dynamic(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """NTK-aware scaling of the base, once the context is longer than the trained one."""
    factor, dim = _factor(rope), rope.rotary_dim
    trained = rope.max_position_embeddings
    stretch = factor * max(max_positions, trained) / trained - (factor - 1.0)
    base = rope.rope_theta * stretch ** (dim / (dim - 2))
    return 1.0 / base ** _exponents(rope), 1.0


def _yarn(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """Peng et al., arXiv 2309.00071: fast pairs keep their frequency, slow ones interpolate."""
    factor, dim = _factor(rope), rope.rotary_dim

    def pair_that_turns(rotations: float) -> float:
        """The (fractional) pair that makes so many turns over the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    extrapolated = 1 - interpolated
    wavelengths = rope.rope_theta ** _exponents(rope)
    frequencies = interpolated / (factor * wavelengths) + extrapolated / wavelengths

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        scale = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    else:
        scale = magnitude(1.0)
    return frequencies, scale


def _llama3(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between are mixed."""
    frequencies = _default(rope, max_positions)[0]
    factor, context = _factor(rope), rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    keep = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies, 1.0


def _longrope(rope: RopeParameters, max_positions: int) -> tuple[Tensor, float]:
    """Ding et al., arXiv 2402.13753: searched factors, for short and for long contexts."""
    original = rope.original_max_position_embeddings
    factors = rope.long_factor if max_positions > original else rope.short_factor
    extension = rope.factor or rope.max_position_embeddings / original
    scale = 1.0
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif extension > 1:
        scale = math.sqrt(1 + math.log(extension) / math.log(original))
    stretched = torch.tensor(factors, dtype=torch.float32) * rope.rope_theta ** _exponents(rope)
    return 1.0 / stretched, scale


def _factor(rope: RopeParameters) -> float:
    if rope.factor is not None:
        return rope.factor
    return rope.max_position_embeddings / rope.original_max_position_embeddings


_METHODS: dict[str, Callable[[RopeParameters, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
