"""The memory-bound ops of a layer, and sampling: from a decode step to a chunk of a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.work import Named, Work, in_turn, input_sets, own_kernels
from torch import Tensor

from headrace_kernels.kv_format import row_size

WIDTH, INTERMEDIATE = 4096, 14336
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64


def rows(machine: Machine) -> Named:
    for count in (1, 64, 2048, 8192) if not machine.dry_run else (3,):
        yield f"add_rms_norm T={count}", functools.partial(_norm, machine, count)
        yield f"silu_and_mul T={count}", functools.partial(_activation, machine, count)
        yield f"rope_and_write_kv T={count}", functools.partial(_rope, machine, count)
        yield f"quantize_rows T={count}", functools.partial(_quantize, machine, count)
    for count in (64, 2048) if not machine.dry_run else (3,):
        for name, dtype in (("int8", torch.int8), ("e4m3", torch.float8_e4m3fn)):
            label = f"to {name} T={count}"
            yield f"add_rms_norm {label}", functools.partial(_norm, machine, count, dtype)
            yield f"silu_and_mul {label}", functools.partial(_activation, machine, count, dtype)
            yield f"rope_and_write_kv {label}", functools.partial(_rope, machine, count, dtype)
    for count in (1, 256) if not machine.dry_run else (2,):
        for filters in ("greedy", "plain", "top_p"):
            label = f"sample {filters} R={count}"
            yield label, functools.partial(_sample, machine, count, filters)


def _work(
    machine: Machine,
    stem: str,
    run: Callable[..., object],
    make: Callable[[], tuple[Tensor, ...]],
    written: int,
) -> Work:
    """Of an op whose inputs are `make`'s and are read once; `written` bytes come on top."""
    sets = input_sets(machine, make)
    calls = {
        name: functools.partial(run, kernels)
        for name, kernels in own_kernels(machine, stem).items()
    }
    read = sum(tensor.nbytes for tensor in sets[0])
    return Work(in_turn(calls, sets), frozenset(calls), read + written, 0.0, repeats=len(sets))


def _normal(machine: Machine, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=machine.device).to(dtype or machine.dtype)


def _scale(machine: Machine, count: int, dtype: torch.dtype | None) -> Tensor | None:
    """Of rows of 8 bits: one a row."""
    return None if dtype is None else torch.empty(count, 1, device=machine.device)


def _norm(machine: Machine, count: int, dtype: torch.dtype | None = None) -> Work:
    weight = _normal(machine, WIDTH, dtype=torch.float32)
    out = torch.empty(count, WIDTH, dtype=dtype or machine.dtype, device=machine.device)
    scale = _scale(machine, count, dtype)

    def make() -> tuple[Tensor, ...]:
        fp32 = _normal(machine, count, WIDTH, dtype=torch.float32)
        return _normal(machine, count, WIDTH), fp32

    def run(kernels, x, residual):  # type: ignore[no-untyped-def]
        kernels.add_rms_norm(x, residual, weight, 1e-5, out, scale)

    return _work(machine, "norm", run, make, out.nbytes + 4 * count * WIDTH)


def _activation(machine: Machine, count: int, dtype: torch.dtype | None = None) -> Work:
    shape = count, INTERMEDIATE
    out = torch.empty(shape, dtype=dtype or machine.dtype, device=machine.device)
    scale = _scale(machine, count, dtype)

    def run(kernels, gate_up):  # type: ignore[no-untyped-def]
        kernels.silu_and_mul(gate_up, out, scale)

    return _work(
        machine,
        "activation",
        run,
        lambda: (_normal(machine, count, 2 * INTERMEDIATE),),
        out.nbytes,
    )


def _rope(machine: Machine, count: int, kv_dtype: torch.dtype | None = None) -> Work:
    device = machine.device
    blocks, cached = count // PAGE + 1, kv_dtype or machine.dtype
    page = PAGE, row_size(DIM, cached)
    cache = torch.zeros((blocks, 2, KV_HEADS, *page), dtype=cached, device=device)
    positions = torch.arange(count, device=device)
    slots = torch.randperm(blocks * PAGE, device=device)[:count]
    cos_sin = _normal(machine, count, 2, DIM // 2, dtype=torch.float32)
    q = torch.empty(count, HEADS, DIM, dtype=machine.dtype, device=device)

    def run(kernels, qkv):  # type: ignore[no-untyped-def]
        kernels.rope_and_write_kv(qkv, positions, cos_sin, cache, slots, q, None, None, 0.0)

    width = (HEADS + 2 * KV_HEADS) * DIM
    written = q.nbytes + count * 2 * KV_HEADS * page[1] * cached.itemsize + cos_sin.nbytes
    return _work(machine, "rope", run, lambda: (_normal(machine, count, width),), written)


def _quantize(machine: Machine, count: int) -> Work:
    out = torch.empty(count, WIDTH, dtype=torch.int8, device=machine.device)
    scale = torch.empty(count, 1, device=machine.device)

    def run(kernels, x):  # type: ignore[no-untyped-def]
        kernels.quantize_rows(x, out, scale)

    return _work(
        machine, "quantization", run, lambda: (_normal(machine, count, WIDTH),), out.nbytes
    )


def _sample(machine: Machine, count: int, filters: str) -> Work:
    device, vocabulary = machine.device, machine.size(151_936, 300)
    full = functools.partial(torch.full, (count,), device=device)
    columns = {
        "temperature": full(0.0 if filters == "greedy" else 0.8),
        "top_k": full(0, dtype=torch.int32),
        "top_p": full(0.9 if filters == "top_p" else 1.0),
        "min_p": full(0.0),
        "seeds": torch.arange(count, device=device),
        "positions": torch.arange(count, device=device),
    }
    out = torch.empty(count, dtype=torch.int64, device=device)

    def run(kernels, logits):  # type: ignore[no-untyped-def]
        kernels.sample_tokens(logits, **columns, out=out)

    return _work(
        machine,
        "sampling",
        run,
        lambda: (_normal(machine, count, vocabulary, dtype=torch.float32) * 3,),
        out.nbytes,
    )
