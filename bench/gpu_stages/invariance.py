"""Whether what a request gets depends on its own tokens only, asked of the whole engine.

Tokens and their log-probabilities, which are computed from all logits of a row, must be equal to
the bit: alone, batched at three budgets, after cache hits, and preempted.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from bench.gpu_stages.engine import Options, build
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.record import Case, Result
from bench.gpu_stages.workloads import Workload

from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, SamplingParams

Found = dict[str, tuple[list[int], list[float]]]
"""Of each request its tokens and their log-probabilities."""
LONGEST = 256


def cases(machine: Machine) -> Iterator[Case]:
    for kv_dtype in ("auto",) if machine.dry_run else ("auto", "int8", "fp8"):
        name = f"invariance, KV {kv_dtype}"
        yield Case(name, functools.partial(_check, machine, kv_dtype))


def _check(machine: Machine, kv_dtype: str) -> Result:
    requests = _requests(machine.size(200, 2), machine.seed)
    engine = _engine(machine, kv_dtype, requests, budget=machine.size(1024, 16))
    alone: Found = {}
    for request in requests:
        engine.reset_prefix_cache()
        alone |= _run(engine, [request])
    for budget in (48, 131, 1024) if not machine.dry_run else (5, 16):
        engine = _engine(machine, kv_dtype, requests, budget=budget)
        _compare(alone, _run(engine, requests), f"batched, {budget} tokens a step")
    before = engine.stats().prefix_hit_tokens
    _compare(alone, _run(engine, requests), "after cache hits")
    hits = engine.stats().prefix_hit_tokens - before
    small = _engine(machine, kv_dtype, requests, budget=machine.size(131, 16), blocks=5)
    _compare(alone, _run(small, requests), "preempted")
    preemptions = small.stats().preemptions
    if not machine.dry_run and not (hits and preemptions):
        raise AssertionError(f"{hits} hits and {preemptions} preemptions: nothing was tried")
    tokens = sum(len(own) for own, _ in alone.values())
    return {"requests": len(requests), "tokens": tokens, "hits": hits, "preemptions": preemptions}


def _engine(
    machine: Machine,
    kv_dtype: str,
    requests: list[GenerateRequest],
    *,
    budget: int,
    blocks: int | None = None,
) -> Engine:
    """`blocks`: of the KV cache, so few that not all requests fit."""
    model = "tiny" if machine.dry_run else "Qwen3-0.6B"
    workload = Workload("", [request.prompt_token_ids for request in requests], [1] * len(requests))
    options: Options = {
        "model_options": {"max_model_len": LONGEST},
        "scheduler": {"max_num_seqs": min(16, budget), "max_num_batched_tokens": budget},
        "cache": {"kv_cache_dtype": kv_dtype},
        "device": {"deterministic": True},
    }
    engine = build(machine, model, workload, options)
    if blocks is not None:
        row_bytes = engine.info.kv_cache_bytes // engine.info.num_blocks
        options["cache"]["kv_cache_memory_bytes"] = blocks * row_bytes
        engine = build(machine, model, workload, options)
    return engine


def _requests(count: int, seed: int) -> list[GenerateRequest]:
    """Ragged prompts, some with a common beginning, each with a seed of its own."""
    rng = random.Random(seed)
    common = [rng.randrange(300) for _ in range(150)]
    requests = []
    for index in range(count):
        own = [rng.randrange(300) for _ in range(rng.randint(1, 80))]
        begin = common[: rng.randint(66, 150)] if index % 2 and count > 10 else []
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 24 if count > 10 else 2),
            temperature=0.9,
            top_p=0.95,
            seed=index,
            ignore_eos=True,
            logprobs=0,
        )
        prompt = begin + (own if count > 10 else own[:9])
        requests.append(
            GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
        )
    return requests


def _run(engine: Engine, requests: list[GenerateRequest]) -> Found:
    found: Found = {request.request_id: ([], []) for request in requests}
    for handle, request in enumerate(requests):
        engine.add(request, handle)
    while engine.has_work:
        for output in engine.step().details:
            tokens, logprobs = found[output.request_id]
            tokens.extend(output.token_ids)
            logprobs.extend(entry.logprob for entry in output.logprobs or ())
        engine.check_invariants()
    return found


def _compare(expected: Found, found: Found, how: str) -> None:
    different = [request for request in expected if expected[request] != found[request]]
    if different:
        raise AssertionError(f"{how}: {len(different)} requests differ, the first {different[0]}")
