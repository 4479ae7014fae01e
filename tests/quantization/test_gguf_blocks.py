"""GGUF blocks packed without a loss: what is unpacked is what the gguf package dequantizes."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import pytest
import torch

from headrace.errors import CheckpointError
from headrace.quantization import gguf_blocks
from headrace.quantization.gguf_blocks import GGUFBlocks
from headrace.quantization.gguf_formats import PACKED_FORMATS, packed_format, why_not_packed
from headrace_kernels.packed_format import FORMATS
from headrace_kernels.packed_weight import unpack

ROWS, COLUMNS = 72, 512
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Bytes of a block at which d and dmin are."""
D, D_MINIMUM = 0.01, 0.02
LARGEST = {"Q2_K": (3, 15, 15), "Q3_K": (4, 32, 0), "Q4_K": (15, 63, 63), "Q5_K": (31, 63, 63)}
LARGEST["Q6_K"] = (32, 128, 0)
"""Integers that multiply a scale, in scales and in minima."""


@dataclass
class Stored:
    """What a GGUFTensor shows of itself."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    bytes: np.ndarray
    interleaved_heads: int | None = None

    @property
    def raw(self) -> memoryview:
        return memoryview(self.bytes.tobytes())


def stored(kind: str, rng: np.random.Generator, heads: int | None = None) -> Stored:
    quantization = gguf.GGMLQuantizationType[kind]
    values = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    if kind in SCALES_AT:  # the package only reads them
        _, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        raw = rng.integers(0, 256, (ROWS, COLUMNS // 256, block_bytes), dtype=np.uint8)
        for at, scale in zip(SCALES_AT[kind], (D, D_MINIMUM), strict=False):
            raw[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        raw = raw.reshape(ROWS, -1)
    else:
        raw = gguf.quants.quantize(values, quantization)
    return Stored("model.w", (ROWS, COLUMNS), kind, raw, heads)


def packed(tensor: Stored, *, exact_scales: bool = False) -> torch.Tensor:
    method = GGUFBlocks(exact_scales=exact_scales)
    fmt = method.format_of(tensor)
    assert fmt in FORMATS
    out = torch.full(fmt.shape(*tensor.shape), 255, dtype=torch.uint8)
    method.read(tensor, fmt, (out,))
    return unpack(out, fmt)[:ROWS]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", PACKED_FORMATS)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("exact_scales", [False, True])
def test_values(
    kind: str,
    heads: int | None,
    exact_scales: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_blocks, "PIECE_BYTES", 1 << 13)  # several pieces of 16 rows or more
    tensor = stored(kind, rng, heads)
    quantization = gguf.GGMLQuantizationType[kind]
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.bytes, quantization).copy())
    if heads:
        expected = expected.view(heads, -1, 2, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)
    got = packed(tensor, exact_scales=exact_scales)
    if kind in SCALES_AT and not exact_scales:  # scales and minima are rounded to fp16
        integer, scale, minimum = LARGEST[kind]
        limit = 2**-11 * (integer * D * scale + D_MINIMUM * minimum)
        assert 0 < (got - expected).abs().max() < limit
    else:
        assert torch.equal(got, expected)


def test_what_cannot_be_packed_is_left() -> None:
    assert packed_format("Q8_K", (64, 512)) is None
    assert packed_format("F16", (64, 512)) is None
    assert packed_format("Q8_0", (512,)) is None
    assert packed_format("Q8_0", (4, 40)) is None

    @dataclass
    class Safetensor:
        name = "model.w"
        shape = (64, 512)

    assert GGUFBlocks().format_of(Safetensor()) is None


@pytest.mark.parametrize("kind", PACKED_FORMATS)
def test_blocks_are_decoded_on_the_device_they_are_on(kind: str) -> None:
    blocks = torch.empty(16, 2, gguf_blocks._BLOCK_BYTES[kind], dtype=torch.uint8, device="meta")
    for field in gguf_blocks._DECODERS[kind](blocks):
        assert field is None or field.is_meta


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("kind", "at"), [("Q4_1", 2), *((k, v[-1]) for k, v in SCALES_AT.items())])
def test_a_scale_that_is_not_finite_is_refused(
    bad: float, kind: str, at: int, rng: np.random.Generator
) -> None:
    tensor = stored(kind, rng)
    tensor.bytes[40, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=r"model\.w has a scale that is not finite"):
        packed(tensor)


@pytest.mark.parametrize(
    ("quantization", "shape", "reason"),
    [
        ("Q4_1", (64, 64), None),
        ("IQ4_NL", (64, 256), "no packed format for IQ4_NL"),
        ("Q4_0", (64, 48), "its 48 inputs are not a multiple of 32"),
        ("Q8_0", (64,), "not a matrix"),
    ],
)
def test_why_a_tensor_is_not_packed(
    quantization: str, shape: tuple[int, ...], reason: str | None
) -> None:
    assert why_not_packed(quantization, shape) == reason
