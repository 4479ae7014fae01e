"""Grouped 4- and 8-bit weights into the packed form of packed_format.py and back.

It knows no file formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.packed_format import COLUMNS, FORMATS, GROUP, PackedFormat


def pack_into(
    packed: Tensor, fmt: PackedFormat, integers: Tensor, scale: Tensor, minimum: Tensor | None
) -> None:
    """Pack rows into `packed`, of the shape that `fmt` gives; missing rows of the last are zeros.

    Args:
        integers: uint8; of 4 bits [Out, In / 32, 16], input i in the low and i + 16 in the high
            half of byte i; of 8 bits [Out, In / 32, 32].
        scale, minimum: [Out, In / 32] float16.
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
                begin = fmt.integer_bytes + 2 * COLUMNS * index
                halves = target[..., begin : begin + 2 * COLUMNS].view(torch.float16)
                halves[..., :height].copy_(values[rows].view(count, height, groups).mT)


def unpack(packed: Tensor) -> Tensor:
    """The weights of a packed tensor -> [16 * blocks, In] float32."""
    rows = torch.arange(packed.shape[0] * COLUMNS, device=packed.device)
    return unpack_rows(packed, rows)


def unpack_rows(packed: Tensor, rows: Tensor) -> Tensor:
    """Rows of the weights: int64 [T] -> [T, In] float32."""
    fmt = FORMATS[packed.shape[2]]
    block, column = rows // COLUMNS, rows % COLUMNS
    end = fmt.integer_bytes
    quads = packed[..., :end].view(*packed.shape[:2], -1, COLUMNS, 4)
    integers = quads[block, :, :, column].flatten(2)
    if fmt.bits == 4:
        integers = torch.cat((integers & 15, integers >> 4), dim=-1)

    def halves(begin: int) -> Tensor:
        values = packed[..., begin : begin + 2 * COLUMNS].view(torch.float16)
        return values[block, :, column].float().unsqueeze(-1)

    weights: Tensor = (integers.float() - fmt.zero) * halves(end)
    if fmt.has_minimum:
        weights = weights + halves(end + 2 * COLUMNS)
    return weights.flatten(1)
