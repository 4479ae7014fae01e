"""How long an engine step takes by what it computes: what bench/cluster_sim.py runs on.

    .venv/bin/python bench/step_times.py --save bench/results/step_times.json

Times steps that only decode (some numbers of requests, short and long contexts) and steps that only
compute a prompt (chunks, with and without tokens before them), several rounds of each in turn, and
fits a sum of five terms. Of each case the fastest step counts: what else the machine does only
adds. The error of the fit is printed and saved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the server's engine process

import numpy as np

from headrace.config import CacheOptions, DeviceOptions, EngineConfig, ModelOptions
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.engine.hardware import probe
from headrace.loading.resolver import resolve_model
from headrace.sampling_params import GenerateRequest, SamplingParams

TERMS = ("base", "per_row", "per_context_token", "per_prompt_token", "per_prompt_pair")
DECODES = ((1, 64), (1, 1500), (4, 64), (8, 64), (8, 1000), (16, 64), (16, 500), (32, 64))
"""(requests, tokens in the cache of each)"""
PROMPT = 1536
"""Tokens of the prompt whose chunks are timed."""
Case = tuple[float, ...]
"""What each of TERMS is multiplied with."""


def ids(length: int, salt: int) -> list[int]:
    return [1000 + (7 * salt + 13 * position) % 20_000 for position in range(length)]


def add(engine: Engine, requests: int, length: int, max_tokens: int) -> None:
    engine.reset_prefix_cache()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for index in range(requests):
        engine.add(
            GenerateRequest(
                request_id=str(index), prompt_token_ids=ids(length, index), sampling=sampling
            ),
            index,
        )


def timed(engine: Engine) -> tuple[float, int]:
    """(seconds, tokens) of a step."""
    begin = time.perf_counter()
    stats = engine.step().stats
    assert stats is not None
    return time.perf_counter() - begin, stats.step_tokens


def decode(engine: Engine, requests: int, context: int, steps: int) -> dict[Case, list[float]]:
    add(engine, requests, context, max_tokens=2 * steps + context * requests)
    while timed(engine)[1] != requests:
        pass  # prompts
    seconds = [timed(engine)[0] for _ in range(steps)]
    for index in range(requests):
        engine.abort(str(index))
    while engine.has_work:
        engine.step()
    mean = requests * (context + steps / 2)
    return {(1.0, requests, mean, 0.0, 0.0): seconds}


def prompt(engine: Engine, length: int) -> dict[Case, list[float]]:
    add(engine, 1, length, max_tokens=1)
    found: dict[Case, list[float]] = {}
    before = 0
    while engine.has_work:
        seconds, tokens = timed(engine)
        if tokens:
            case = (1.0, 0.0, 0.0, float(tokens), tokens * (before + tokens / 2))
            found.setdefault(case, []).append(seconds)
            before += tokens
    return found


def fit(times: dict[Case, float]) -> tuple[dict[str, float], float]:
    """(terms, none below zero, the largest relative error): least squares of relative errors."""
    cases = np.array(list(times))
    seconds = np.array(list(times.values()))
    terms = list(range(len(TERMS)))
    while True:
        scaled = cases[:, terms] / seconds[:, None]
        found = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            break
        terms.remove(terms[int(found.argmin())])
    weights = np.zeros(len(TERMS))
    weights[terms] = found
    error = float(np.abs(cases @ weights / seconds - 1).max())
    return dict(zip(TERMS, weights.tolist(), strict=True)), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="(default: the default model)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a case and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="write the terms to this JSON file")
    args = parser.parse_args()
    path = resolve_model(args.model)
    engine = build_engine(
        EngineConfig(
            model=str(path),
            model_options=ModelOptions(max_model_len=2048),
            cache=CacheOptions(kv_cache_memory_bytes=1 << 30),
            device=DeviceOptions(device="cpu", threads=args.threads),
        )
    )
    samples: dict[Case, list[float]] = {}
    for round_number in range(args.rounds + 1):
        for requests, context in DECODES:
            steps = args.steps if round_number else 4
            for case, seconds in decode(engine, requests, context, steps).items():
                if round_number:  # the first round warms up
                    samples.setdefault(case, []).extend(seconds)
        for length in (64, 128, PROMPT):
            for case, seconds in prompt(engine, length).items():
                if round_number:
                    samples.setdefault(case, []).extend(seconds)
    times = {case: min(seconds) for case, seconds in samples.items()}
    terms, error = fit(times)
    for name, value in terms.items():
        print(f"{name:<20}{value * 1e6:>10.3f} us")
    print(f"the largest error of the fit is {error:.0%}")
    if args.save:
        info = engine.info
        record = {
            "command": f"bench/step_times.py --rounds {args.rounds} --steps {args.steps} "
            f"--threads {args.threads}",
            "model": path.name,
            "cpu": probe("cpu").name,
            "threads": args.threads,
            "python": platform.python_version(),
            "seconds": terms,
            "largest_relative_error": error,
            "block_size": info.block_size,
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": int(max(case[3] for case in times)),
            "cases": [
                {**dict(zip(TERMS[1:], case[1:], strict=True)), "seconds": seconds}
                for case, seconds in times.items()
            ],
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
