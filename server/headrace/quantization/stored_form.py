"""The QuantMethod of quantized checkpoints in safetensors files."""

from __future__ import annotations

from torch import Tensor

from headrace.quantization.integers import pack, read_rows
from headrace.quantization.method import Format, StoredTensor
from headrace.quantization.stored_weight import QuantizedWeight
from headrace_kernels.packed_format import PackedFormat


class StoredForm:
    """Keeps quantized weights as the integers they are, for 8-bit products or packed.

    `scaled`: 8-bit rows that are meant for 8-bit activations are multiplied with those; else what
    can be is packed, with `exact_scales` without rounding a scale. All else becomes dense.
    """

    def __init__(self, *, scaled: bool, exact_scales: bool = False) -> None:
        self._scaled = scaled
        self._exact_scales = exact_scales

    def format_of(self, tensor: StoredTensor) -> Format | None:
        if not isinstance(tensor, QuantizedWeight):
            return None
        if self._scaled:
            return tensor.scheme.scaled_format(tensor.shape)
        return tensor.scheme.packed_format(
            tensor.shape, scales_are_fp16=tensor.scales_are_fp16, exact=self._exact_scales
        )

    def read(self, tensor: StoredTensor, fmt: Format, into: tuple[Tensor, ...]) -> None:
        assert isinstance(tensor, QuantizedWeight)
        if isinstance(fmt, PackedFormat):
            pack(tensor.name, tensor.scheme, tensor.parts, fmt, into[0])
        else:
            read_rows(tensor.name, tensor.scheme, tensor.parts, *into)
