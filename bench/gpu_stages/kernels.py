"""Each kernel's time beside its limit, and beside what other libraries take for the same work.

The limit of a case is the larger of two times: its bytes, each read and written once, at the
measured rate of a copy, and its operations at the measured rate of a large product of that type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from bench.gpu_stages.attention_work import attention
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.product_work import products
from bench.gpu_stages.record import Case, Result
from bench.gpu_stages.row_work import rows
from bench.gpu_stages.work import Ceilings, Work

WORK = (attention, products, rows)


def cases(machine: Machine) -> Iterator[Case]:
    ceilings = functools.cache(functools.partial(measure_ceilings, machine))
    yield Case("ceilings", lambda: ceilings().result())
    for make in WORK:
        for name, build in make(machine):
            yield Case(name, functools.partial(_measure, machine, build, ceilings))


def _measure(
    machine: Machine, build: Callable[[], Work], ceilings: Callable[[], Ceilings]
) -> Result:
    with torch.inference_mode():
        work = build()
        limit = ceilings().microseconds(work.nbytes, work.operations, work.arithmetic)
        result: Result = {}
        for name, call in work.calls.items():
            try:
                us = machine.median_us(call) / work.repeats
            except Exception as error:  # another library may lack this shape or this machine
                if name in work.ours:
                    raise
                result[f"{name} error"] = f"{type(error).__name__}: {error}"[:200]
                continue
            result[f"{name} us"] = us
            if name in work.ours:
                result[f"{name} of limit"] = limit / us
        result["limit us"] = limit
        result["GB"], result["TFLOP"] = work.nbytes / 1e9, work.operations / 1e12
    return result


def measure_ceilings(machine: Machine) -> Ceilings:
    """Rates of this GPU: device-to-device copy, a read-only stream, bf16, fp8 and int8 products."""
    size, side = machine.size(1 << 32, 1 << 12), machine.size(8192, 64)
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    read = source.view(torch.int32)

    def rate(amount: float, call: Callable[[], object]) -> float:
        return amount / machine.median_us(call) * 1e6

    copy = rate(2 * size, lambda: target.copy_(source))
    stream = rate(size, lambda: read.sum())
    generator = machine.generator("ceilings")
    a, b = (torch.randn(side, side, device=machine.device, generator=generator) for _ in range(2))
    operations = 2.0 * side**3
    rates = {
        "bf16": rate(
            operations, functools.partial(torch.mm, a.to(machine.dtype), b.to(machine.dtype))
        )
    }
    if not machine.dry_run:
        one = torch.ones((), device=machine.device)
        e4m3 = [m.to(torch.float8_e4m3fn) for m in (a, b)]
        rates["fp8"] = rate(
            operations,
            lambda: torch._scaled_mm(
                e4m3[0], e4m3[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
            ),
        )
        int8 = [(m * 30).to(torch.int8) for m in (a, b)]
        rates["int8"] = rate(operations, lambda: torch._int_mm(int8[0], int8[1].t()))
    return Ceilings(copy=copy, read=stream, operations=rates)
