"""What a request computes depends only on its own tokens: bit-equal logits, however it is run."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.build import build_engine
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels import dispatch

Logits = dict[tuple[int, int], torch.Tensor]

TRITON = "headrace_kernels.triton"
# Of the checkpoint in conftest.py.
VOCAB_SIZE, LAYERS, KV_HEADS, HEAD_DIM = 160, 2, 2, 16


def make_requests(count: int) -> list[GenerateRequest]:
    """Ragged prompts, some with a common beginning, each with a seed of its own."""
    rng = np.random.default_rng(2)
    common = rng.integers(1, VOCAB_SIZE, 70).tolist()
    requests = []
    for index in range(count):
        own = rng.integers(1, VOCAB_SIZE, int(rng.integers(1, 90))).tolist()
        prompt = common[: int(rng.integers(20, 70))] + own if index % 2 else own
        sampling = SamplingParams(
            max_tokens=int(rng.integers(1, 24)),
            temperature=0.9,
            top_p=0.95,
            seed=index,
            ignore_eos=True,
        )
        requests.append(
            GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
        )
    return requests


class Recorder:
    """An engine that keeps the logits it sampled from, by (seed, position)."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        dtype: str = "float32",
        kv_dtype: str = "auto",
        budget: int = 256,
        kv_bytes: int = 1 << 21,
        keep_every: int = 1,
        kernel: tuple[str, ...] = (),
        max_model_len: int = 256,
    ) -> None:
        self.engine = build_engine(
            EngineConfig(
                model=str(checkpoint),
                model_options=ModelOptions(dtype=dtype, max_model_len=max_model_len),
                cache=CacheOptions(
                    kv_cache_memory_bytes=kv_bytes, block_size=4, kv_cache_dtype=kv_dtype
                ),
                scheduler=SchedulerOptions(max_num_seqs=16, max_num_batched_tokens=budget),
                device=DeviceOptions(
                    device="cpu",
                    threads=2 if keep_every > 1 else 1,
                    deterministic=True,
                    kernel=kernel,
                ),
            )
        )
        self.logits: Logits = {}
        self.tokens: dict[int, list[int]] = {}
        self.preemptions = 0
        sampler = self.engine._runner._sampler
        sample = sampler.sample

        def record(logits, batch, *, reuse=False):
            before = logits.clone()
            result = sample(logits, batch, reuse=reuse)
            for row, key in enumerate(
                zip(batch.seed.tolist(), batch.position.tolist(), strict=True)
            ):
                self.logits[key] = before[row, ::keep_every].clone()
                self.tokens.setdefault(key[0], []).append(int(result.token_ids[row]))
            return result

        sampler.sample = record

    def run(self, requests: list[GenerateRequest]) -> Recorder:
        for handle, request in enumerate(requests):
            self.engine.add(request, handle)
        while self.engine.has_work:
            outputs = self.engine.step()
            self.preemptions = outputs.stats.preemptions
            self.engine.check_invariants()
        return self


def assert_same(expected: Logits, actual: Logits) -> None:
    assert expected.keys() == actual.keys()
    different = [key for key in expected if not torch.equal(expected[key], actual[key])]
    assert not different, f"logits differ at (request, position) {different[:5]}"


@pytest.fixture(scope="module")
def alone(checkpoint) -> Recorder:
    """Each request by itself, in an engine that has seen the ones before: no cache."""
    recorder = Recorder(checkpoint)
    for request in make_requests(24):
        recorder.engine.reset_prefix_cache()
        recorder.run([request])
    return recorder


@pytest.mark.parametrize("budget", [16, 37, 256])
def test_batched_and_chunked(checkpoint, alone, budget):
    together = Recorder(checkpoint, budget=budget).run(make_requests(24))
    assert_same(alone.logits, together.logits)
    assert alone.tokens == together.tokens


def test_after_cache_hits(checkpoint, alone):
    recorder = Recorder(checkpoint).run(make_requests(24))
    recorder.logits.clear()
    before = recorder.engine.stats().prefix_hit_tokens
    recorder.run(make_requests(24))
    assert recorder.engine.stats().prefix_hit_tokens > before + 500, "the cache must have hit"
    assert_same(alone.logits, recorder.logits)


def test_after_preemptions(checkpoint, alone):
    full_request = 256 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    recorder = Recorder(checkpoint, kv_bytes=full_request).run(make_requests(24))
    assert recorder.preemptions > 0, "the pool must be too small"
    assert_same(alone.logits, recorder.logits)


def test_an_int8_cache(checkpoint, alone):
    """A hit, a chunk and a decode read what a prefill wrote and attended to: rounded."""
    requests = make_requests(24)
    single = Recorder(checkpoint, kv_dtype="int8")
    for request in requests:
        single.engine.reset_prefix_cache()
        single.run([request])
    assert single.logits.keys() == alone.logits.keys()
    assert any(not torch.equal(single.logits[key], alone.logits[key]) for key in alone.logits)
    together = Recorder(checkpoint, budget=37, kv_dtype="int8").run(requests)
    assert_same(single.logits, together.logits)
    together.logits.clear()
    before = together.engine.stats().prefix_hit_tokens
    together.run(requests)
    assert together.engine.stats().prefix_hit_tokens > before + 500, "the cache must have hit"
    assert_same(single.logits, together.logits)
    full_request = 256 * 2 * LAYERS * KV_HEADS * (HEAD_DIM + 4)
    preempted = Recorder(checkpoint, kv_bytes=full_request, kv_dtype="int8").run(requests)
    assert preempted.preemptions > 0, "the pool must be too small"
    assert_same(single.logits, preempted.logits)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "count"),
    [("auto", "auto", 200), ("auto", "int8", 100), ("float32", "auto", 60)],
)
def test_real_weights(smollm2_path, dtype, kv_dtype, count):
    """The same on SmolLM2: alone, batched at three budgets, after cache hits, preempted."""
    requests = make_requests(count)
    options = {"dtype": dtype, "kv_dtype": kv_dtype, "kv_bytes": 1 << 27, "keep_every": 97}
    single = Recorder(smollm2_path, **options)
    for request in requests:
        single.engine.reset_prefix_cache()
        single.run([request])
    for budget in (48, 131, 1024):
        together = Recorder(smollm2_path, budget=budget, **options).run(requests)
        assert_same(single.logits, together.logits)
    together.logits.clear()
    together.run(requests)
    assert_same(single.logits, together.logits)  # after cache hits
    row_bytes = 64 + 4 if kv_dtype == "int8" else 64 * (4 if dtype == "float32" else 2)
    room = 256 * 2 * 30 * 3 * row_bytes
    preempted = Recorder(smollm2_path, **(options | {"kv_bytes": room})).run(requests)
    assert preempted.preemptions > 0, "the pool must be too small"
    assert_same(single.logits, preempted.logits)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_triton_kernels(checkpoint, ascending_dots, kv_dtype, pytestconfig):
    """The deterministic set of a GPU, interpreted, which takes its time; bench/gpu.py asks the same
    of a GPU."""
    count = pytestconfig.getoption("--invariance-requests")
    stems = [stem for stem in dispatch.OPS if importlib.util.find_spec(f"{TRITON}.{stem}")]
    options = {
        "kernel": tuple(f"{stem}=triton" for stem in stems),
        "kv_dtype": kv_dtype,
        "max_model_len": 32,
    }
    requests = [
        GenerateRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids[:12],
            # Behind the first few: short ones, for the time it takes.
            sampling=dataclasses.replace(
                request.sampling, max_tokens=1 + (index % 4 * 4 if index < 12 else index % 2)
            ),
        )
        for index, request in enumerate(make_requests(count))
    ]
    single = Recorder(checkpoint, **options)
    for request in requests:
        single.engine.reset_prefix_cache()
        single.run([request])
    for budget in (16, 37, 256):
        together = Recorder(checkpoint, budget=budget, **options).run(requests)
        assert_same(single.logits, together.logits)
    together.logits.clear()
    before = together.engine.stats().prefix_hit_tokens
    together.run(requests)
    assert together.engine.stats().prefix_hit_tokens > before, "the cache must have hit"
    assert_same(single.logits, together.logits)
    row_bytes = HEAD_DIM + 4 if kv_dtype == "int8" else 4 * HEAD_DIM
    full_request = 32 * 2 * LAYERS * KV_HEADS * row_bytes
    preempted = Recorder(checkpoint, kv_bytes=full_request, **options).run(requests)
    assert preempted.preemptions > 0, "the pool must be too small"
    assert_same(single.logits, preempted.logits)
