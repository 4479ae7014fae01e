"""The QuantMethod that rounds the weights of decoder layers to 8 bits as they are loaded.

Each output has its own scale, max|w| / 127 (int8) or / 448 (e4m3): no calibration, and products
with 8-bit activations that are scaled token by token (W8A8). Embeddings and head stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.quantization.integers import Integers, pack_integers
from headrace.quantization.method import Format, StoredTensor
from headrace.quantization.scheme import load_time_format
from headrace_kernels.packed_format import PackedFormat
from headrace_kernels.reference.quantization import quantize_rows

PIECE_VALUES = 1 << 22
"""Rounded at a time: bounds the fp32 copies that rounding makes."""


class LoadTimeForm:
    """`quantization` is a value of the option of that name.

    `packed` is for where products of packed weights have a kernel, and those of int8 rows none.
    """

    def __init__(self, quantization: str, *, packed: bool) -> None:
        self._quantization = quantization
        self._packed = packed

    def format_of(self, tensor: StoredTensor) -> Format | None:
        return load_time_format(self._quantization, tensor.name, tensor.shape, packed=self._packed)

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


def _round(weight: Tensor, values: Tensor, scale: Tensor) -> None:
    step = max(1, PIECE_VALUES // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        quantize_rows(weight[rows], values[rows], scale[rows])
