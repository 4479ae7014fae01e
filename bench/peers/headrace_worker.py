"""Headrace's engine, loaded once and asked many times: python -m bench.peers.headrace_worker."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.peers import worker
from bench.peers.workload import INT8_TERA_OPS, READ_GB

from headrace.config import DeviceOptions, EngineConfig
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels import bench

WARM_STEPS = 2
SPARE_TOKENS = 64  # requests that start first have as many more steps than the last one


def decode_rate(engine: Engine, prompts: Sequence[list[int]], output_len: int) -> float:
    """Tokens per second over `output_len` steps in which every request decodes one token."""
    _add(engine, prompts, max_tokens=output_len + SPARE_TOKENS)
    waiting = {str(handle) for handle in range(len(prompts))}
    while waiting:  # the first token of each is told with its details
        waiting -= {detail.request_id for detail in engine.step().details}
    for _ in range(WARM_STEPS):
        engine.step()
    sizes = set()
    begin = time.perf_counter()
    for _ in range(output_len):
        outputs = engine.step()
        sizes.add(outputs.stats.step_tokens if outputs.stats else None)
    seconds = time.perf_counter() - begin
    _drain(engine, len(prompts))
    if sizes != {len(prompts)}:
        raise RuntimeError(f"steps of {sizes} tokens instead of {len(prompts)}")
    return len(prompts) * output_len / seconds


def prefill_rate(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Prompt tokens per second until each request has its first token."""
    _add(engine, prompts, max_tokens=1)
    begin = time.perf_counter()
    while engine.has_work:
        engine.step()
    return sum(map(len, prompts)) / (time.perf_counter() - begin)


def _add(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> None:
    engine.reset_prefix_cache()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for handle, prompt in enumerate(prompts):
        engine.add(
            GenerateRequest(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling),
            handle,
        )


def _drain(engine: Engine, requests: int) -> None:
    for handle in range(requests):
        engine.abort(str(handle))
    while engine.has_work:
        engine.step()


def ceilings() -> dict[str, float]:
    """What the engine's threads can do at most, measured now."""
    found = bench.measure_ceilings()
    return {
        READ_GB: found.memory / 1e9,
        INT8_TERA_OPS: found.operations["int8"] / 1e12,
        "bf16 TFLOPS": found.operations["bf16"] / 1e12,
    }


def load() -> tuple[Mapping[str, Any], Callable[[Any], Mapping[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    device = DeviceOptions(device="cpu", threads=args.threads)
    engine = build_engine(EngineConfig(model=args.model, device=device))
    gc.freeze()  # as the server's engine process does

    def answer(question: Any) -> Mapping[str, Any]:
        if question.get("ceilings"):
            return ceilings()
        warm, timed, output_len = question["warm"], question["prompts"], question["output_len"]
        if output_len:
            return {"rate": decode_rate(engine, timed, output_len)}
        prefill_rate(engine, warm)
        return {"rate": prefill_rate(engine, timed)}

    return {"kernels": engine.info.kernels, "dtype": engine.info.dtype}, answer


if __name__ == "__main__":
    worker.serve(load)
