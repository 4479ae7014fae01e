"""The QuantMethod that rounds the weights of decoder layers to 8 bits as they are loaded.

Each output has its own scale, max|w| / 127 (int8) or / 448 (e4m3): no calibration, and products
with 8-bit activations that are scaled token by token (W8A8). Embeddings and head stay as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headrace.quantization.integers import Integers, pack_integers
from headrace.quantization.method import Format, ScaledFormat, StoredTensor
from headrace_kernels.packed_format import GROUP, PackedFormat
from headrace_kernels.reference.quantization import quantize_rows

PIECE_VALUES = 1 << 22
"""Rounded at a time: bounds the fp32 copies that rounding makes."""


class LoadTimeForm:
    """`packed` is for where products of packed weights have a kernel, and int8 ones have none."""

    def __init__(self, dtype: Literal["int8", "e4m3"], *, packed: bool = False) -> None:
        assert not packed or dtype == "int8"
        self._fmt: Format = PackedFormat(8, False) if packed else ScaledFormat(dtype)

    def format_of(self, tensor: StoredTensor) -> Format | None:
        return self._fmt if is_rounded(tensor.name, tensor.shape) else None

    def read(self, tensor: StoredTensor, fmt: Format, into: tuple[Tensor, ...]) -> None:
        device = into[0].device
        weight = torch.empty(tensor.shape, device=device)
        tensor.read_into(weight)
        if not isinstance(fmt, PackedFormat):
            _round(weight, *into)
            return
        values = torch.empty(tensor.shape, dtype=torch.int8, device=device)
        scale = torch.empty((len(weight), 1), device=device)
        _round(weight, values, scale)
        zero = torch.full((1, 1), float(fmt.zero), device=device)
        integers = Integers(values.view(torch.uint8) ^ 0x80, scale, zero)
        pack_integers(tensor.name, into[0], fmt, integers, None)


def is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a matrix of a decoder layer."""
    return name.startswith("model.layers.") and len(shape) == 2 and shape[1] % GROUP == 0


def _round(weight: Tensor, values: Tensor, scale: Tensor) -> None:
    step = max(1, PIECE_VALUES // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        quantize_rows(weight[rows], values[rows], scale[rows])
