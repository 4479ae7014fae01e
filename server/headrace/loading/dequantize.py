"""GGUF blocks to float32, on the CPU. Owns the bit layouts of the stored types and nothing else.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. Products and sums are
rounded in the order of the gguf package's numpy code, which makes the results bit-equal to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor


def dequantize(blocks: Tensor, quantization: str) -> Tensor:
    """`blocks: [num_blocks, block_bytes] uint8` -> `[num_blocks, block_size] float32`."""
    return _DECODERS[quantization](blocks)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as a float32 column: [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., w] bytes -> [..., 2w] values: all low nibbles, then all high ones."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=-1)


def _bits(packed: Tensor, width: int, count: int) -> Tensor:
    """[n, g, w] bytes -> [n, g * count, w]: field i is bits [i*width, (i+1)*width) of each byte."""
    shifts = torch.arange(count, dtype=torch.uint8, device=packed.device).mul_(width)
    fields = (packed.unsqueeze(2) >> shifts.view(1, 1, count, 1)) & ((1 << width) - 1)
    return fields.flatten(1, 2)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 high bits at byte `at`, little endian, as [n, 32] values 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, at : at + 4].unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1) << 4


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 2:]).float().sub_(8)
    return q.mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 4:]).float()
    return q.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    q = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float().sub_(16)
    return q.mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float()
    return q.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    q = blocks[:, 2:].view(torch.int8).float()
    return q.mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    """16 scales and minima of 4 bits, 256 values of 2 bits, then d and dmin."""
    n = len(blocks)
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    scale = (_half(blocks, 80) * (scales & 0x0F).float()).view(n, 16, 1)
    minimum = (_half(blocks, 82) * (scales >> 4).float()).view(n, 16, 1)
    q = _bits(packed.reshape(n, 2, 32), 2, 4).reshape(n, 16, 16).float()
    return q.mul_(scale).sub_(minimum).view(n, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    """A mask of high bits (set: no offset), 256 low pairs of bits, 16 scales of 6 bits, d."""
    n = len(blocks)
    mask, packed, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    low = _nibbles(scales[:, :8])
    high = _bits(scales[:, 8:].reshape(n, 1, 4), 2, 4).reshape(n, 16)
    scale = (low | (high << 4)).float().sub_(32).mul_(_half(blocks, 108)).view(n, 16, 1)
    q = _bits(packed.reshape(n, 2, 32), 2, 4).reshape(n, 16, 16)
    kept = _bits(mask.reshape(n, 1, 32), 1, 8).reshape(n, 16, 16)
    return (q | (kept << 2)).float().sub_(4).mul_(scale).view(n, 256)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of 6 bits that Q4_K and Q5_K pack in bytes 4 to 16, times
    d and dmin: two [n, 8, 1]."""
    n = len(blocks)
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minimum = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=-1)
    scaled = scale.float().mul_(_half(blocks, 0)).view(n, 8, 1)
    return scaled, minimum.float().mul_(_half(blocks, 2)).view(n, 8, 1)


def _q4_k(blocks: Tensor) -> Tensor:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    q = _bits(blocks[:, 16:].reshape(n, 4, 32), 4, 2).float()
    return q.mul_(scale).sub_(minimum).view(n, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    low = _bits(blocks[:, 48:].reshape(n, 4, 32), 4, 2)
    high = _bits(blocks[:, 16:48].reshape(n, 1, 32), 1, 8)
    q = (low | (high << 4)).float()
    return q.mul_(scale).sub_(minimum).view(n, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """256 low nibbles, 256 high pairs of bits, 16 signed scales of 8 bits, d."""
    n = len(blocks)
    low = _bits(blocks[:, :128].reshape(n, 2, 64), 4, 2).reshape(n, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(n, 2, 32), 2, 4)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208)).view(n, 16, 1)
    q = (low | (high << 4)).view(n, 16, 16).float().sub_(32)
    return q.mul_(scale).view(n, 256)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
