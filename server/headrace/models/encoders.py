"""Encoders of any shape: one model of a config."""

from __future__ import annotations

import torch

from headrace.models.bert import Encoder
from headrace.models.encoder_config import EncoderConfig
from headrace.models.modernbert import ModernEncoder
from headrace_kernels.kernel_set import KernelSet

EncoderModel = Encoder | ModernEncoder


def build_encoder(
    config: EncoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: KernelSet,
    max_positions: int,
) -> EncoderModel:
    """Without its weights yet. `max_positions`: tokens of the longest request."""
    if config.modern is not None:
        return ModernEncoder(
            config, dtype=dtype, device=device, kernels=kernels, max_positions=max_positions
        )
    return Encoder(config, dtype=dtype, device=device, kernels=kernels)
