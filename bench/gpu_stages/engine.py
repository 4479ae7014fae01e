"""The engine end to end, on random weights of real shapes: rates, times to the first token, host
time per step."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench.gpu_stages.check import kernels_here
from bench.gpu_stages.checkpoints import random_checkpoint
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.record import Case, Result
from bench.gpu_stages.workloads import Workload, nano_vllm, uniform

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, SamplingParams

Options = dict[str, dict[str, Any]]
"""Of EngineConfig's groups."""
BF16: Options = {}
FP8_KV: Options = {"cache": {"kv_cache_dtype": "fp8"}}
FP8: Options = {"model_options": {"quantization": "fp8"}, "cache": {"kv_cache_dtype": "fp8"}}
INT8: Options = {"model_options": {"quantization": "int8"}, "cache": {"kv_cache_dtype": "int8"}}


def cases(machine: Machine) -> Iterator[Case]:
    if machine.dry_run:
        for name, options in (
            ("float16", BF16),
            ("int8 KV", {"cache": {"kv_cache_dtype": "int8"}}),
        ):
            yield _case(machine, "tiny", uniform(2, 20, 3, 300), name, options)
        return
    yield _case(machine, "Qwen3-0.6B", nano_vllm(), "bf16", BF16)
    yield _case(machine, "Qwen3-0.6B", nano_vllm(), "bf16, fp8 KV", FP8_KV)
    yield _case(machine, "Llama-3.1-8B", uniform(1, 128, 256), "bf16", BF16)
    yield _case(machine, "Llama-3.1-8B", uniform(512, 1000, 1000), "fp8", FP8)
    yield _case(machine, "Llama-3.1-8B", uniform(1, 128, 256), "fp8", FP8)
    yield _case(machine, "Qwen3-8B", uniform(256, 1000, 1000), "bf16", BF16)
    yield _case(machine, "Llama-3.1-8B", uniform(512, 1000, 1000), "int8", INT8)


def _case(machine: Machine, model: str, workload: Workload, name: str, options: Options) -> Case:
    label = f"{model} {name}: {workload.name}"
    return Case(label, functools.partial(_measure, machine, model, workload, options))


def _measure(machine: Machine, model: str, workload: Workload, options: Options) -> Result:
    start = time.perf_counter()
    engine = build(machine, model, workload, options)
    loaded = time.perf_counter()
    _run(engine, uniform(1, 16, 2, 300))
    first = time.perf_counter()
    _run(engine, dataclasses.replace(workload, output_lengths=[2] * len(workload.prompts)))
    while engine.idle():  # captures the graphs that are missing
        pass
    waits = _count_waits(engine, workload)
    engine.reset_prefix_cache()
    times = _run(engine, workload)
    engine.check_invariants()
    result: Result = {
        "output tok/s": workload.output_tokens / times.seconds,
        "seconds": times.seconds,
        "steps": times.steps,
        "median step ms": statistics.median(times.step_seconds) * 1e3,
        "median host us": statistics.median(times.host_seconds) * 1e6,
        "waits in launch": waits,
        "load s": loaded - start,
        "load and first tokens s": first - start,
        "kernels": " ".join(f"{stem}={name}" for stem, name in engine.info.kernels.items()),
        "KV tokens": engine.info.num_blocks * engine.info.block_size,
    }
    if (graphs := getattr(engine._runner, "graphs", None)) is not None:
        result |= {"graphs": len(graphs.captured), "graph pool growth": graphs.pool_growth}
        if graphs.pool_growth:
            result["error"] = f"graphs behind the first took {graphs.pool_growth} bytes more"
    del engine
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def build(machine: Machine, model: str, workload: Workload, options: Options) -> Engine:
    """An engine that is ready to step, on a random checkpoint in memory."""
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    path = random_checkpoint(model, folder / "headrace-bench", machine.seed)
    groups: Options = {
        "model_options": {"max_model_len": workload.longest + 1},
        "scheduler": {"max_num_seqs": min(512, max(2, len(workload.prompts)))},
        "device": {"device": str(machine.device)},
    }
    if machine.dry_run:
        groups["model_options"]["dtype"] = "float16"
        groups["device"]["kernel"] = tuple(f"{stem}={name}" for name, stem in kernels_here(machine))
        groups["cache"] = {"block_size": 64, "kv_cache_memory_bytes": 4 << 20}
    for group, values in options.items():
        groups[group] = groups.get(group, {}) | values
    config = EngineConfig(
        model=str(path),
        model_options=ModelOptions(**groups["model_options"]),
        cache=CacheOptions(**groups.get("cache", {})),
        scheduler=SchedulerOptions(**groups["scheduler"]),
        device=DeviceOptions(**groups["device"]),
    )
    return build_engine(config)


@dataclasses.dataclass
class Times:
    seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    host_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of a step, without the time in which it waited for the device."""

    @property
    def steps(self) -> int:
        return len(self.step_seconds)


def _run(engine: Engine, workload: Workload) -> Times:
    """Run a workload to its end."""
    for index, (prompt, length) in enumerate(
        zip(workload.prompts, workload.output_lengths, strict=True)
    ):
        sampling = SamplingParams(
            temperature=workload.temperature, max_tokens=length, ignore_eos=True, seed=index
        )
        request = GenerateRequest(
            request_id=f"{workload.name} {index}", prompt_token_ids=prompt, sampling=sampling
        )
        engine.add(request, index)
    times = Times()
    waited = _count_waiting(engine)
    start = time.perf_counter()
    while engine.has_work:
        begin, before = time.perf_counter(), waited()
        engine.step()
        seconds = time.perf_counter() - begin
        times.step_seconds.append(seconds)
        times.host_seconds.append(seconds - (waited() - before))
    times.seconds = time.perf_counter() - start
    return times


def _count_waits(engine: Engine, workload: Workload) -> int:
    """Operations of a few steps that made the host wait for the device, as torch sees them."""
    if not engine.info.device.startswith("cuda"):
        return 0
    prompts = workload.prompts[:4]
    few = dataclasses.replace(workload, prompts=prompts, output_lengths=[4] * len(prompts))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _run(engine, few)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def _count_waiting(engine: Engine) -> Callable[[], float]:
    """Seconds spent so far in waiting for results of steps."""
    runner, total = engine._runner, 0.0
    launch = getattr(runner, "_launch_unmeasured", runner.launch)

    class Measured:
        def __init__(self, pending: Any) -> None:
            self._pending = pending

        def result(self) -> Any:
            nonlocal total
            begin = time.perf_counter()
            found = self._pending.result()
            total += time.perf_counter() - begin
            return found

    runner._launch_unmeasured = launch
    runner.launch = lambda batch: Measured(launch(batch))
    return lambda: total
