"""Stored integers of quantized layers: unpacked, and put into the forms that kernels take.

Owns the bit layouts of GPTQ (arXiv 2210.17323, as AutoGPTQ stores it), AWQ (arXiv 2306.00978, as
AutoAWQ's "gemm" kernels take it) and compressed-tensors
(https://github.com/vllm-project/compressed-tensors). All of them pack along the last dimension
into little-endian words of 32 bits, the first value in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.quantization.method import BLOCK
from headrace.quantization.scheme import Scheme
from headrace_kernels.packed_format import GROUP, PackedFormat
from headrace_kernels.packed_weight import pack_into

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word the value of each of eight columns is."""
CPU = torch.device("cpu")


class StoredPart(Protocol):
    def load(self, device: torch.device | None = None) -> Tensor: ...


Parts = Mapping[str, StoredPart]


class Integers(NamedTuple):
    """A weight is scale * (values - zero)."""

    values: Tensor
    """[Out, In] uint8."""
    scale: Tensor
    """[Out, G] float32."""
    zero: Tensor
    """[Out, G] or [1, 1] float32."""


def unpacked(name: str, scheme: Scheme, parts: Parts, device: torch.device = CPU) -> Integers:
    """The integers of a weight with scales of groups, or of int8 rows.

    Raises CheckpointError, with `name`, for a scale that is not finite, or for zero points and an
    order of inputs that are not what the scheme says.
    """
    bits = scheme.bits
    loaded = {key: part.load(device) for key, part in parts.items() if key != "weight_shape"}
    zeros: Tensor | None = None
    if scheme.layout == "gptq":
        values = _unpack(loaded["qweight"].t(), bits)
        scale = loaded["scales"].t().float()
        zeros = _unpack(loaded["qzeros"], bits).t().float() + scheme.zero_offset
    elif scheme.layout == "awq":
        values = _awq(loaded["qweight"]).t()
        scale = loaded["scales"].t().float()
        zeros = _awq(loaded["qzeros"]).t().float()
    elif scheme.layout == "packed":
        values = _unpack(loaded["weight_packed"], bits)
        scale = _column(loaded["weight_scale"], len(values))
        if "weight_zero_point" in loaded:
            zeros = _unpack(loaded["weight_zero_point"].t(), bits)[:, : len(values)].t().float()
    else:
        values = loaded["weight"].view(torch.uint8) ^ 0x80
        scale = _column(_scale_of(loaded), len(values))
    _check_finite(name, scale)
    middle = torch.full((1, 1), 1 << (bits - 1), dtype=torch.float32, device=device)
    if zeros is None:
        return Integers(values, scale, middle)
    if scheme.symmetric:
        if not (zeros == middle).all():
            raise CheckpointError(
                f"{name} has zero points, but its quantization_config says that there are none "
                "(sym). Correct the config, or use another checkpoint."
            )
        zeros = middle
    return Integers(values, scale, zeros)


def dequantize(name: str, scheme: Scheme, parts: Parts) -> Tensor:
    """The weights of a quantized layer: [Out, In] float32, on the CPU."""
    if scheme.layout == "rows":
        rows, scale = _rows_and_scale(name, scheme, parts, CPU)
        if scheme.of_blocks:
            scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        dense = rows.float().mul_(scale[: rows.shape[0], : rows.shape[1]])
        if dense.sum().isnan():
            raise _nan(name)
        return dense
    values, scale, zero = unpacked(name, scheme, parts)
    group = _group_of_input(name, scheme, parts, values.shape[1])
    zero = zero if zero.shape[1] == 1 else zero[:, group]
    return (values.float() - zero) * (scale if scale.shape[1] == 1 else scale[:, group])


def pack(name: str, scheme: Scheme, parts: Parts, fmt: PackedFormat, packed: Tensor) -> None:
    """The integers of a weight, in the packed form."""
    values, scale, zero = unpacked(name, scheme, parts, packed.device)
    if "g_idx" in parts:
        _group_of_input(name, scheme, parts, values.shape[1])
    pack_integers(name, packed, fmt, Integers(values, scale, zero), scheme.group_size)


def pack_integers(
    name: str, packed: Tensor, fmt: PackedFormat, weight: Integers, group_size: int | None
) -> None:
    """Those of a weight, in the packed form; a scale of a larger group is repeated in each of 32.

    Raises CheckpointError, with `name`, for a scale that the form cannot hold.
    """
    values, scale, zero = weight
    outputs, inputs = values.shape
    integers = values.contiguous().view(outputs, inputs // GROUP, GROUP)
    if fmt.bits == 4:
        integers = integers[..., : GROUP // 2] | (integers[..., GROUP // 2 :] << 4)
    dtype = torch.float32 if fmt.scale_bits == 32 else torch.float16
    group = torch.arange(0, inputs, GROUP, device=values.device) // (group_size or inputs)
    minimum = (-scale * zero)[:, group].to(dtype) if fmt.has_minimum else None
    scale = scale[:, group].to(dtype)
    _check_finite(name, scale)
    if minimum is not None:
        _check_finite(name, minimum)
    pack_into(packed, fmt, integers, scale, minimum)


def read_rows(name: str, scheme: Scheme, parts: Parts, weight: Tensor, scale: Tensor) -> None:
    """8-bit rows as they are stored, and their scales; one of a tensor becomes one a row."""
    rows, found = _rows_and_scale(name, scheme, parts, weight.device)
    weight.copy_(rows)
    if weight.dtype == torch.float8_e4m3fn and (weight.view(torch.uint8) & 0x7F).amax() == 0x7F:
        raise _nan(name)
    scale.copy_(found)


def _rows_and_scale(
    name: str, scheme: Scheme, parts: Parts, device: torch.device
) -> tuple[Tensor, Tensor]:
    loaded = {key: part.load(device) for key, part in parts.items()}
    rows, scale = loaded["weight"], _scale_of(loaded)
    _check_finite(name, scale)
    return rows, scale if scheme.of_blocks else _column(scale, len(rows))


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[R, W] int32 -> [R, W * 32 / bits] uint8."""
    values = words.contiguous().view(torch.uint8)
    if bits == 8:
        return values
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)


def _awq(words: Tensor) -> Tensor:
    values = _unpack(words, 4)
    return values.view(len(values), -1, 8)[..., list(AWQ_ORDER)].flatten(1)


def _scale_of(loaded: Mapping[str, Tensor]) -> Tensor:
    scale = loaded.get("weight_scale", loaded.get("weight_scale_inv"))
    assert scale is not None, "joined as quantized because it has one"
    return scale.float()


def _column(scale: Tensor, rows: int) -> Tensor:
    """[rows, G] float32 of scales that are one, one a row, or G a row."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1)
    return scale.reshape(rows, -1)


def _group_of_input(name: str, scheme: Scheme, parts: Parts, inputs: int) -> Tensor:
    """[In] int64: the group of each input. Raises CheckpointError for an unexpected order."""
    size = scheme.group_size or inputs
    group = torch.arange(inputs) // size
    if "g_idx" not in parts:
        return group
    stored = parts["g_idx"].load().long()
    if not scheme.ordered and not torch.equal(stored, group):
        raise CheckpointError(
            f"The inputs of {name} are ordered (g_idx), but its quantization_config says that they "
            "are not (desc_act). Correct the config, or use another checkpoint."
        )
    if not 0 <= int(stored.min()) <= int(stored.max()) <= int(group[-1]):
        raise CheckpointError(f"The g_idx of {name} names groups that are not there.")
    return stored


def _check_finite(name: str, scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise CheckpointError(
            f"Tensor {name} has a scale that is not finite, or too large for {scale.dtype}. "
            "The file is corrupt: download it again."
        )


def _nan(name: str) -> CheckpointError:
    return CheckpointError(f"Tensor {name} has values that are NaN: download the file again.")
