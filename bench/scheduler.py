"""Host cost of a step without the model: schedule, build the batch, sampling columns, update.

    .venv/bin/python bench/scheduler.py --running 256

Prints the median and 90th percentile over all-decode steps, split by part, and with `--save` writes
them as JSON: of steps one after another, and of steps that overlap, where the next is scheduled
before the last is filed. The two take turns. The model is absent: its tokens are constants.
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

from headrace.engine.batch import ScheduledBatch, StepResult, build_model_input
from headrace.engine.block_pool import BlockPool
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.request import RunningRequests
from headrace.engine.sampling_batch import sampling_columns
from headrace.engine.scheduler import Scheduler
from headrace.sampling_params import GenerateRequest, SamplingParams

PARTS = ("schedule", "build input", "sampling columns", "update", "encode")
WARM_UP = 6  # the first steps are the prompts
Samples = dict[str, list[float]]


class Decoding:
    """Requests that decode, and the scheduler that serves them."""

    def __init__(self, num_running: int, block_size: int, steps: int, *, overlaps: bool) -> None:
        self._running = RunningRequests(num_running, 4096, block_size, [0])
        self._block_size = block_size
        kv_cache = KVCacheManager(
            BlockPool(num_running * 4096 // block_size // 4),
            self._running,
            block_size=block_size,
            key=b"bench",
            kv_dtype="bfloat16",
        )
        self._scheduler = Scheduler(
            self._running, kv_cache, max_num_batched_tokens=1 << 20, eos_token_ids=[0]
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._in_flight: list[ScheduledBatch] = []
        self._overlaps = overlaps
        rng = np.random.default_rng(0)
        for index in range(num_running):
            # Lengths differ, so that rows cross block borders in different steps, as in service.
            prompt = rng.integers(1, 30_000, int(rng.integers(64, 512))).tolist()
            sampling = SamplingParams(max_tokens=steps + 10, temperature=0.7, top_p=0.9)
            self._scheduler.add(
                GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling),
                index,
            )

    def step(self) -> list[float]:
        """Microseconds of each part; none if there is no result to file yet."""
        marks = [time.perf_counter()]
        batch = self._scheduler.schedule()
        marks.append(time.perf_counter())
        build_model_input(batch, self._running, block_size=self._block_size, pad_to=8)
        marks.append(time.perf_counter())
        sampling_columns(self._running, batch.rows[batch.samples], batch.ends[batch.samples])
        marks.append(time.perf_counter())
        self._in_flight.append(batch)
        if len(self._in_flight) == self._overlaps:
            return []
        batch = self._in_flight.pop(0)
        tokens = np.full(int(batch.samples.sum()), 7, np.int64)
        outputs = self._scheduler.update(batch, StepResult(token_ids=tokens))
        marks.append(time.perf_counter())
        self._encoder.encode(outputs)
        marks.append(time.perf_counter())
        return [(end - start) * 1e6 for start, end in zip(marks[:-1], marks[1:], strict=True)]


def measure(num_running: int, block_size: int, steps: int) -> tuple[Samples, Samples]:
    """(one after another, overlapped): microseconds of each part and of the step, by step."""
    modes = [Decoding(num_running, block_size, steps, overlaps=mode) for mode in (False, True)]
    samples: list[Samples] = [{part: [] for part in (*PARTS, "step")} for _ in modes]
    for step in range(steps):
        for mode, found in zip(modes, samples, strict=True):
            times = mode.step()
            if step >= WARM_UP:
                for part, value in zip((*PARTS, "step"), (*times, sum(times)), strict=True):
                    found[part].append(value)
    return samples[0], samples[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256, help="requests that decode")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV block")
    parser.add_argument("--steps", type=int, default=500, help="steps to measure")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    modes = measure(args.running, args.block_size, args.steps)
    print(f"{'us per step':<18}{'one by one':>18}{'overlapped':>18}")
    print(" " * 18 + f"{'median':>9}{'p90':>9}" * 2)
    for part in modes[0]:
        columns = [
            figure
            for samples in modes
            for figure in (
                statistics.median(samples[part]),
                statistics.quantiles(samples[part], n=10)[-1],
            )
        ]
        print(f"{part:<18}" + "".join(f"{figure:>9.1f}" for figure in columns))
    if args.save:
        one_by_one, overlapped = (
            {part: statistics.median(values) for part, values in samples.items()}
            for samples in modes
        )
        args.save.write_text(
            json.dumps(
                {
                    "command": f"bench/scheduler.py --running {args.running} "
                    f"--block-size {args.block_size} --steps {args.steps}",
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "median_us": one_by_one,
                    "overlapped_median_us": overlapped,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
