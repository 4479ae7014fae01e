"""Matrix products of Llama-3.1-8B's layers: dense, 8-bit and 4-bit weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.work import Named, Work, in_turn, input_sets, own_kernels
from torch import Tensor

from headrace_kernels.packed_format import PackedFormat

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
"""(Out, In)"""


def products(machine: Machine) -> Named:
    tiny = machine.dry_run
    shapes = {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    for name, (outputs, inputs) in ({"tiny": (64, 128)} if tiny else shapes).items():
        for rows in (1, 5) if tiny else (1, 16, 64, 256, 4096):
            for kind, make in KINDS.items():
                label = f"{kind} {name} M={rows}"
                yield label, functools.partial(make, machine, rows, outputs, inputs)


def _normal(machine: Machine, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device, dtype=machine.dtype)


def _dense(machine: Machine, rows: int, outputs: int, inputs: int) -> Work:
    out = torch.empty(rows, outputs, dtype=machine.dtype, device=machine.device)
    sets = input_sets(
        machine, lambda: (_normal(machine, rows, inputs), _normal(machine, outputs, inputs))
    )
    own = {
        name: functools.partial(lambda kernels, x, w: kernels.linear(x, w, None, out), kernels)
        for name, kernels in own_kernels(machine, "linear").items()
    }
    others = {"torch.mm": lambda x, w: torch.mm(x, w.t(), out=out)}
    return _product(own, others, sets, rows, outputs, inputs, 2.0, "bf16")


def _product(
    own: Mapping[str, Callable[..., object]],
    others: Mapping[str, Callable[..., object]],
    sets: Sequence[tuple[Tensor, ...]],
    rows: int,
    outputs: int,
    inputs: int,
    weight_bytes: float,
    arithmetic: str,
) -> Work:
    nbytes = outputs * inputs * weight_bytes + rows * (inputs * min(weight_bytes, 2) + outputs * 2)
    return Work(
        in_turn({**own, **others}, sets),
        frozenset(own),
        nbytes,
        2.0 * rows * outputs * inputs,
        arithmetic,
        len(sets),
    )


def _scaled(machine: Machine, rows: int, outputs: int, inputs: int, *, dtype: torch.dtype) -> Work:
    device = machine.device
    out = torch.empty(rows, outputs, dtype=machine.dtype, device=device)

    def make() -> tuple[Tensor, ...]:
        bits = [(torch.randn(n, inputs, device=device) * 20).to(dtype) for n in (rows, outputs)]
        scales = [torch.full((n, 1), 0.01, device=device) for n in (rows, outputs)]
        return bits[0], scales[0], bits[1], scales[1]

    sets = input_sets(machine, make)
    own = {
        name: functools.partial(lambda kernels, *a: kernels.scaled_linear(*a, None, out), kernels)
        for name, kernels in own_kernels(machine, "scaled_linear").items()
    }
    dense = [tensor.to(machine.dtype) for tensor in (sets[0][0], sets[0][2])]
    others = {"torch.mm of bf16": lambda *_: torch.mm(dense[0], dense[1].t(), out=out)}
    if dtype == torch.float8_e4m3fn:
        others["torch._scaled_mm"] = lambda x, xs, w, ws: torch._scaled_mm(
            x, w.t(), scale_a=xs, scale_b=ws.t(), out_dtype=machine.dtype
        )
    arithmetic = "int8" if dtype == torch.int8 else "fp8"
    return _product(own, others, sets, rows, outputs, inputs, 1.0, arithmetic)


def _four_bits(machine: Machine, rows: int, outputs: int, inputs: int) -> Work:
    fmt = PackedFormat(4, False)
    out = torch.empty(rows, outputs, dtype=machine.dtype, device=machine.device)

    def make() -> tuple[Tensor, ...]:
        packed = torch.randint(
            0, 64, fmt.shape(outputs, inputs), dtype=torch.uint8, device=machine.device
        )  # bytes below 64 are small numbers as halves of fp16 scales too
        return _normal(machine, rows, inputs), packed

    sets = input_sets(machine, make)
    own = {
        name: functools.partial(
            lambda kernels, x, w: kernels.quantized_linear(x, w, fmt, 16, None, out), kernels
        )
        for name, kernels in own_kernels(machine, "quantized_linear").items()
    }
    dense = _normal(machine, outputs, inputs)
    others = {"torch.mm of bf16": lambda x, w: torch.mm(x, dense.t(), out=out)}
    weight_bytes = fmt.nbytes(outputs, inputs) / (outputs * inputs)
    return _product(own, others, sets, rows, outputs, inputs, weight_bytes, "bf16")


KINDS: Mapping[str, Callable[[Machine, int, int, int], Work]] = {
    "bf16": _dense,
    "fp8": functools.partial(_scaled, dtype=torch.float8_e4m3fn),
    "int8": functools.partial(_scaled, dtype=torch.int8),
    "w4a16": _four_bits,
}
