"""Every stored type against the numpy code of the gguf package, bit for bit, on random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from headrace.loading.dequantize import dequantize
from headrace.loading.gguf import QUANTIZATIONS, Quantization

NUM_BLOCKS = 700


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for kind, ours in QUANTIZATIONS.items():
        theirs = gguf.GGMLQuantizationType(kind)
        assert ours.name == theirs.name
        assert (ours.block_size, ours.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=lambda q: q.name)
def test_blocks_are_decoded_on_the_device_they_are_on(quantization: Quantization) -> None:
    blocks = torch.empty(3, quantization.block_bytes, dtype=torch.uint8, device="meta")
    assert dequantize(blocks, quantization.name).is_meta


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=lambda q: q.name)
def test_random_blocks_dequantize_bit_for_bit(
    quantization: Quantization, rng: np.random.Generator
) -> None:
    # Random scales cover every float16: subnormals, infinities and NaN among them.
    raw = rng.integers(0, 256, (NUM_BLOCKS, quantization.block_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quantization.name])

    actual = dequantize(torch.from_numpy(raw), quantization.name)

    assert actual.shape == (NUM_BLOCKS, quantization.block_size)
    assert actual.dtype == torch.float32
    ours, theirs = actual.numpy(), expected.reshape(actual.shape)
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    # As integers, so that -0.0 and 0.0 differ.
    assert np.array_equal(ours.view(np.int32)[~nan], theirs.view(np.int32)[~nan])
