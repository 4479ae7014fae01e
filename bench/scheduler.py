"""Host cost of a step without the model: schedule, build the batch, sampling columns, update.

    .venv/bin/python bench/scheduler.py --running 256

Prints the median and 90th percentile over all-decode steps, split by part, and with `--save` writes
them as JSON. The model is absent: its tokens are constants.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import msgspec
import numpy as np

from headrace.engine.batch import StepResult, build_model_input
from headrace.engine.block_pool import BlockPool
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.request import RunningRequests
from headrace.engine.sampling_batch import sampling_columns
from headrace.engine.scheduler import Scheduler
from headrace.sampling_params import GenerateRequest, SamplingParams

PARTS = ("schedule", "build input", "sampling columns", "update", "encode")


def measure(num_running: int, block_size: int, steps: int) -> dict[str, list[float]]:
    """Microseconds of each part, one entry a step."""
    running = RunningRequests(num_running, 4096, block_size, [0])
    kv_cache = KVCacheManager(
        BlockPool(num_running * 4096 // block_size // 4),
        running,
        block_size=block_size,
        key=b"bench",
        kv_dtype="bfloat16",
    )
    scheduler = Scheduler(running, kv_cache, max_num_batched_tokens=1 << 20, eos_token_ids=[0])
    rng = np.random.default_rng(0)
    for index in range(num_running):
        # Lengths differ, so that rows cross block borders in different steps, as in service.
        prompt = rng.integers(1, 30_000, int(rng.integers(64, 512))).tolist()
        sampling = SamplingParams(max_tokens=steps + 10, temperature=0.7, top_p=0.9)
        scheduler.add(
            GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling),
            index,
        )
    encoder = msgspec.msgpack.Encoder()
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(steps):
        marks = [time.perf_counter()]
        batch = scheduler.schedule()
        marks.append(time.perf_counter())
        build_model_input(batch, running, block_size=block_size, pad_to=8)
        marks.append(time.perf_counter())
        sampling_columns(running, batch.rows[batch.samples], batch.ends[batch.samples])
        marks.append(time.perf_counter())
        tokens = np.full(int(batch.samples.sum()), 7, np.int64)
        outputs = scheduler.update(batch, StepResult(token_ids=tokens))
        marks.append(time.perf_counter())
        encoder.encode(outputs)
        marks.append(time.perf_counter())
        if step > 5:  # the first steps are the prompts
            for part, start, end in zip(PARTS, marks[:-1], marks[1:], strict=True):
                samples[part].append((end - start) * 1e6)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256, help="requests that decode")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV block")
    parser.add_argument("--steps", type=int, default=500, help="steps to measure")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    samples = measure(args.running, args.block_size, args.steps)
    totals = [sum(parts) for parts in zip(*samples.values(), strict=True)]
    table = {**samples, "step": totals}
    print(f"{'us per step':<18}{'median':>9}{'p90':>9}")
    for part, values in table.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        print(f"{part:<18}{statistics.median(values):>9.1f}{p90:>9.1f}")
    if args.save:
        figures = {part: statistics.median(values) for part, values in table.items()}
        args.save.write_text(
            json.dumps(
                {
                    "command": f"bench/scheduler.py --running {args.running} "
                    f"--block-size {args.block_size} --steps {args.steps}",
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "median_us": figures,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
