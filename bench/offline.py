"""Decode rate of the engine against transformers' `generate`, interleaved in one process.

    .venv/bin/python bench/offline.py --save bench/results/offline.json

Each round runs every contender once; printed are medians over the rounds and the ratios to
transformers, one request at a time, in its faster dtype. Absolute rates depend on the machine and
on what else it does; ratios from one run hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the server's engine process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from headrace.config import CacheOptions, DeviceOptions, EngineConfig, ModelOptions
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.engine.hardware import probe
from headrace.loading.resolver import resolve_model
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels.dispatch import OPS

PROMPT_TOKENS = 32


def prompt(index: int) -> list[int]:
    """Token ids that differ from request to request, so that no prefix is shared."""
    return [1000 + (7 * index + 13 * position) % 20_000 for position in range(PROMPT_TOKENS)]


def headrace_run(engine: Engine, requests: int, output_tokens: int) -> Callable[[], float]:
    """A function that decodes `requests` together and returns output tokens per second."""

    def run() -> float:
        engine.reset_prefix_cache()
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        for index in range(requests):
            engine.add(
                GenerateRequest(
                    request_id=str(index), prompt_token_ids=prompt(index), sampling=sampling
                ),
                index,
            )
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return requests * output_tokens / (time.perf_counter() - start)

    return run


def transformers_run(path: Path, dtype: torch.dtype, output_tokens: int) -> Callable[[], float]:
    """A function that generates one request with transformers: output tokens per second."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.eval()

    def run() -> float:
        ids = torch.tensor([prompt(0)])
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == PROMPT_TOKENS + output_tokens
        return output_tokens / (time.perf_counter() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=probe("cpu").cores)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    path = resolve_model(args.model)
    contenders: dict[str, Callable[[], float]] = {}
    reference = tuple(f"{stem}=reference" for stem in OPS)
    for label, dtype, kernels in (
        ("headrace", "auto", ()),
        ("headrace reference bfloat16", "bfloat16", reference),
        ("headrace reference float32", "float32", reference),
    ):
        engine = build_engine(
            EngineConfig(
                model=str(path),
                model_options=ModelOptions(dtype=dtype, max_model_len=1024),
                cache=CacheOptions(kv_cache_memory_bytes=1 << 30),
                device=DeviceOptions(device="cpu", threads=args.threads, kernel=kernels),
            )
        )
        for requests in (1, 16):
            run = headrace_run(engine, requests, args.output_tokens)
            contenders[f"{label} B={requests}"] = run
    for dtype in ("float32", "bfloat16"):
        name = f"transformers {dtype} B=1"
        contenders[name] = transformers_run(path, getattr(torch, dtype), args.output_tokens)
    torch.set_num_threads(args.threads)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(args.rounds + 1):
        for name, run in contenders.items():
            rate = run()
            if round_number:  # the first round warms up
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = max(rate for name, rate in medians.items() if name.startswith("transformers"))
    print(f"{'':<34}{'tok/s':>8}{'ratio':>8}")
    for name, rate in medians.items():
        print(f"{name:<34}{rate:>8.1f}{rate / base:>8.2f}")
    if args.save:
        record = {
            "command": f"bench/offline.py --rounds {args.rounds} "
            f"--output-tokens {args.output_tokens} --threads {args.threads}",
            "model": path.name,
            "cpu": probe("cpu").name,
            "threads": args.threads,
            "python": platform.python_version(),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("torch", "transformers")
            },
            "median_tokens_per_second": medians,
            "ratio_to_faster_transformers": {n: rate / base for n, rate in medians.items()},
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
