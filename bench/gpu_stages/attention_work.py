"""Attention over the paged cache: decode and prefill of Llama-3.1-8B's heads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.work import Calls, Named, Work, own_kernels
from torch import Tensor
from torch.nn import functional

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.kv_format import row_size

HEADS = (32, 8, 128)
"""(H, K, D)"""


def attention(machine: Machine) -> Named:
    k = machine.size(1024, 32)
    decode = {
        "64 x 4k": [(1, 4 * k)] * machine.size(64, 2),
        "64 x 1k": [(1, k)] * machine.size(64, 2),
        "1 x 64k + 15 x 4k": [(1, 64 * k // machine.size(1, 16)), *[(1, 4 * k)] * 15],
        "16 x 7936": [(1, 7936 * k // 1024)] * 16,
        "1 x 32k": [(1, 32 * k // machine.size(1, 16))],
    }
    for name, lengths in decode.items():
        for dtype in (machine.dtype, torch.float8_e4m3fn, torch.int8):
            label = f"decode {name} {str(dtype).removeprefix('torch.')}"
            yield label, functools.partial(_attention, machine, lengths, dtype)
    prefill = {
        "8k": [(8 * k, 8 * k)],
        "16 x 1k": [(k, k)] * machine.size(16, 2),
        "1k after 2k": [(k, 3 * k)],
    }
    for name, lengths in prefill.items():
        yield f"prefill {name}", functools.partial(_attention, machine, lengths, machine.dtype)


def _attention(machine: Machine, lengths: Sequence[tuple[int, int]], dtype: torch.dtype) -> Work:
    heads, kv_heads, dim = HEADS if not machine.dry_run else (4, 2, 16)
    page = 64
    query_lens = np.array([query for query, _ in lengths])
    seq_lens = np.array([length for _, length in lengths])
    pages = -(-seq_lens // page)
    shuffled = np.random.default_rng(machine.seed).permutation(int(pages.sum()))
    table = np.zeros((len(lengths), int(pages.max())), np.int64)
    for row, (count, end) in enumerate(zip(pages, np.cumsum(pages), strict=True)):
        table[row, :count] = shuffled[end - count : end]
    tokens = int(query_lens.sum())
    slots = np.zeros(tokens, np.int64)
    device = machine.device
    shape = (int(pages.sum()), 2, kv_heads, page, row_size(dim, dtype))
    generator = machine.generator("attention")
    if dtype == machine.dtype:
        cache = torch.randn(shape, device=device, generator=generator, dtype=dtype)
    else:  # any bytes: 0x3c is 1.0 of e4m3, and 0x3c3c3c3c a scale of 0.01
        cache = torch.full(shape, 0x3C, device=device, dtype=torch.int8).view(dtype)
    q = torch.randn((tokens, heads, dim), device=device, generator=generator, dtype=machine.dtype)
    out = torch.empty_like(q)
    metadata = AttentionMetadata.build(query_lens, seq_lens, table, slots, device)

    def planned(kernels: KernelSet) -> None:
        kernels.paged_attention(q, cache, metadata, dim**-0.5, None, None, out)

    def afresh(kernels: KernelSet) -> None:
        metadata.plans.clear()
        planned(kernels)

    calls: dict[str, Callable[[], object]] = {}
    for name, kernels in own_kernels(machine, "attention", head_dim=dim).items():
        calls[name] = functools.partial(planned, kernels)
        calls[f"{name} with its work list"] = functools.partial(afresh, kernels)
    ours = frozenset(calls)
    if len(set(lengths)) == 1 and dtype == machine.dtype:
        calls |= _rivals(machine, lengths, (heads, kv_heads, dim))
    kv_bytes = 2 * int(seq_lens.sum()) * kv_heads * row_size(dim, dtype) * dtype.itemsize
    pairs = (query_lens * (seq_lens - query_lens) + query_lens * (query_lens + 1) // 2).sum()
    operations = 4.0 * float(pairs) * heads * dim
    return Work(calls, ours, kv_bytes + 2 * q.nbytes, operations)


def _rivals(
    machine: Machine, lengths: Sequence[tuple[int, int]], shape: tuple[int, int, int]
) -> Calls:
    """torch's own attention on contiguous keys and values of requests of one length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    (heads, kv_heads, dim), (query, length), n = shape, lengths[0], len(lengths)
    generator = machine.generator("rivals")

    def normal(*size: int) -> Tensor:
        made = torch.randn(size, device=machine.device, generator=generator, dtype=machine.dtype)
        return made.transpose(1, 2)

    q, k, v = (
        normal(n, query, heads, dim),
        normal(n, length, kv_heads, dim),
        normal(n, length, kv_heads, dim),
    )
    causal = query == length

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            )

    calls: dict[str, Callable[[], object]] = {}
    if query in (1, length):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            calls[f"sdpa {backend.name.split('_')[0].lower()}"] = functools.partial(sdpa, backend)
    if causal:
        calls["varlen_attn"] = functools.partial(_varlen, q, k, v, n, length)
    return calls


def _varlen(q: Tensor, k: Tensor, v: Tensor, n: int, length: int) -> object:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    flat[1:] = [x.repeat_interleave(group, 1) for x in flat[1:]]
    starts = torch.arange(0, (n + 1) * length, length, dtype=torch.int32, device=q.device)
    known = inspect.signature(varlen_attn).parameters  # torch renamed it
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return varlen_attn(*flat, starts, starts, length, length, **causal)
