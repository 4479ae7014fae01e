"""Grouped 4- and 8-bit weights into the packed form of packed_format.py and back.

It knows no file formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.packed_format import COLUMNS, GROUP, PackedFormat


def pack_into(
    packed: Tensor, fmt: PackedFormat, integers: Tensor, scale: Tensor, minimum: Tensor | None
) -> None:
    """Pack rows into `packed`, of the shape that `fmt` gives; missing rows of the last are zeros.

    Args:
        integers: uint8; of 4 bits [Out, In / 32, 16], input i in the low and i + 16 in the high
            half of byte i; of 8 bits [Out, In / 32, 32].
        scale, minimum: [Out, In / inputs_per_scale], float16 or float32 as the format says.
    """
    blocks, groups, _ = packed.shape
    out_features = len(integers)
    assert packed.shape == fmt.shape(out_features, groups * GROUP)
    if out_features % COLUMNS:
        packed[-1] = 0
    words = integers.contiguous().view(torch.int32)
    whole = out_features // COLUMNS
    # The blocks that are full, then the last one if it is not.
    for first, last in ((0, whole), (whole, blocks)):
        rows = slice(first * COLUMNS, min(last * COLUMNS, out_features))
        if rows.start == rows.stop:
            continue
        count = last - first
        height = (rows.stop - rows.start) // count
        target = packed[first:last]
        # [blocks, groups, word, column] <- [block, column, groups, word]
        fields = target[..., : fmt.integer_bytes].view(torch.int32)
        fields = fields.view(count, groups, -1, COLUMNS)[..., :height]
        fields.copy_(words[rows].view(count, height, groups, -1).permute(0, 2, 3, 1))
        for index, values in enumerate((scale, minimum)):
            if values is not None:
                floats = _floats(target, fmt, index)[..., :height]
                floats.copy_(values[rows].view(count, height, groups, -1).permute(0, 2, 3, 1))


def unpack(packed: Tensor, fmt: PackedFormat) -> Tensor:
    """The weights of a packed tensor -> [16 * blocks, In] float32."""
    rows = torch.arange(packed.shape[0] * COLUMNS, device=packed.device)
    return unpack_rows(packed, fmt, rows)


def unpack_rows(packed: Tensor, fmt: PackedFormat, rows: Tensor) -> Tensor:
    """Rows of the weights: int64 [T] -> [T, In] float32."""
    block, column = rows // COLUMNS, rows % COLUMNS
    quads = packed[..., : fmt.integer_bytes].view(*packed.shape[:2], -1, COLUMNS, 4)
    integers = quads[block, :, :, column].flatten(2)
    if fmt.bits == 4:
        integers = torch.cat((integers & 15, integers >> 4), dim=-1)
    shape = (len(rows), packed.shape[1], fmt.parts, fmt.inputs_per_scale)
    parts = integers.view(shape)
    weights: Tensor = parts.float() - fmt.zero
    weights *= _floats(packed, fmt, 0)[block, :, :, column].float().unsqueeze(-1)
    if fmt.has_minimum:
        weights += _floats(packed, fmt, 1)[block, :, :, column].float().unsqueeze(-1)
    return weights.flatten(1)


def _floats(packed: Tensor, fmt: PackedFormat, index: int) -> Tensor:
    """A view of the scales (0) or minima (1): [blocks, groups, parts, 16 outputs]."""
    begin = fmt.integer_bytes + fmt.scales_bytes * index
    dtype = torch.float16 if fmt.scale_bits == 16 else torch.float32
    floats = packed[..., begin : begin + fmt.scales_bytes].view(dtype)
    return floats.view(*packed.shape[:2], fmt.parts, COLUMNS)
