"""The GPU's runner over a device that computes on the CPU: bits, order, graphs, memory.

Everything but CUDA itself runs: inputs made on the device, graphs, overlap, the way of the results.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.engine.fake_cuda import FakeDevice, fake_kernels, triton_kernels
from torch.utils._python_dispatch import _disable_current_modes

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.batch import ScheduledBatch
from headrace.engine.build import build_engine
from headrace.engine.cuda_graph import POOL_SPARE_BLOCKS
from headrace.engine.cuda_memory import measured_budget
from headrace.engine.cuda_runner import CudaRunner, halves
from headrace.engine.engine import Engine
from headrace.engine.memory import MemoryBudget
from headrace.engine.request import RunningRequests
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels import dispatch
from headrace_kernels.ops import sampling as sampling_ops

VOCAB_SIZE = 160  # of the checkpoint in conftest.py


def cpu_engine(
    checkpoint,
    *,
    budget: int = 64,
    rows: int = 16,
    kv_bytes: int = 1 << 21,
    kv_dtype: str = "auto",
) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(checkpoint),
            model_options=ModelOptions(dtype="float32", max_model_len=256),
            cache=CacheOptions(
                kv_cache_memory_bytes=kv_bytes, block_size=4, kv_cache_dtype=kv_dtype
            ),
            scheduler=SchedulerOptions(max_num_seqs=rows, max_num_batched_tokens=budget),
            device=DeviceOptions(
                device="cpu", threads=1, kernel=tuple(f"{stem}=reference" for stem in dispatch.OPS)
            ),
        )
    )


def cuda_engine(
    checkpoint, *, graphs: bool = True, triton: bool = False, budget: int = 64, **options
) -> Engine:
    """The same engine with the other runner; `engine.device` is the fake."""
    engine = cpu_engine(checkpoint, budget=budget, **options)
    model = engine._runner._model
    kernels = model.context.kernels
    kernels = triton_kernels() if triton else fake_kernels(kernels, capturable=graphs)
    model.context.kernels = kernels
    engine.device = FakeDevice()
    engine._runner = CudaRunner(
        model,
        engine._scheduler.running,
        engine.device,
        num_blocks=engine.info.num_blocks,
        block_size=4,
        kv_dtype=engine._runner._kv_layers[0].dtype,
        pad_to=8,
        max_num_batched_tokens=budget,
        graphs=graphs,
    )
    return engine


def requests(
    count: int, seed: int = 2, max_tokens: int = 12, longest: int = 60
) -> list[GenerateRequest]:
    """Ragged prompts, some with a common beginning, and every way to sample."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, VOCAB_SIZE, 40).tolist()
    kinds = (
        {"temperature": 0.9, "top_p": 0.95, "allowed_token_ids": tuple(range(0, VOCAB_SIZE, 2))},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "logprobs": 0},
        {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "logit_bias": {3: 4.0, 9: -50.0}, "prompt_logprobs": 2},
        {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": (7, 8, 9)},
    )
    made = []
    for index in range(count):
        own = rng.integers(1, VOCAB_SIZE, int(rng.integers(1, longest))).tolist()
        prompt = common[: int(rng.integers(10, 40)) * longest // 60] + own if index % 2 else own
        sampling = SamplingParams(
            max_tokens=int(rng.integers(5, max_tokens)), seed=index, **kinds[index % len(kinds)]
        )
        made.append(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                sampling=sampling,
                # Pairs make a row wait for the step in flight.
                banned_sequences=[[a, b] for a in range(9) for b in range(index % 4)],
            )
        )
    return made


@pytest.fixture
def logits_of(monkeypatch):
    """Runs an engine: (all logits it sampled from, by seed and position; outputs by request)."""
    sample = sampling_ops.sample_tokens
    found: dict[tuple[int, int], torch.Tensor] = {}

    def record(logits, **columns):
        keys = zip(columns["seeds"].clone(), columns["positions"].clone(), strict=True)
        with _disable_current_modes():
            rows = {(int(seed), int(position)): row for row, (seed, position) in enumerate(keys)}
            found.update({key: logits[row].clone() for key, row in rows.items()})
            return sample(logits, **columns)

    monkeypatch.setattr(sampling_ops, "sample_tokens", record)

    def run(engine: Engine, work: list[GenerateRequest], idle_every: int = 0):
        found.clear()
        outputs: dict[str, list] = {request.request_id: [] for request in work}
        for handle, request in enumerate(work):
            engine.add(request, handle)
        steps = 0
        while engine.has_work:
            step = engine.step()
            engine.check_invariants()
            steps += 1
            for handle, token in zip(step.handles, step.token_ids, strict=True):
                outputs[str(handle)].append(token)
            for detail in step.details:
                outputs[detail.request_id].extend(detail.token_ids)
                outputs[detail.request_id] += [
                    value for value in (detail.logprobs, detail.prompt_logprobs) if value
                ]
            if idle_every and steps % idle_every == 0:
                engine._runner.idle()
        return dict(found), outputs

    return run


def assert_same(expected, actual) -> None:
    logits, outputs = expected
    assert outputs == actual[1]
    for key, row in logits.items():
        assert torch.equal(row, actual[0][key]), f"logits differ at (seed, position) {key}"


@pytest.mark.parametrize(
    ("graphs", "budget", "kv_dtype"),
    [("all", 64, "int8"), ("few", 16, "auto"), ("none", 40, "auto")],
)
def test_the_bits_of_the_cpu_runner(checkpoint, logits_of, graphs, budget, kv_dtype):
    work = requests(10)
    expected = logits_of(cpu_engine(checkpoint, kv_dtype=kv_dtype), work)
    engine = cuda_engine(checkpoint, graphs=graphs != "none", budget=budget, kv_dtype=kv_dtype)
    while graphs == "all" and engine._runner.idle():
        pass
    engine.device.run_until(engine.device.enqueued)
    engine.device.waits_in_launch = 0
    found = logits_of(engine, work, idle_every=7 if graphs == "few" else 0)
    assert_same(expected, found)
    if graphs != "few":  # a capture between steps sends neutral inputs
        assert engine.device.waits_in_launch == 0
    assert (len(engine.device.replays) > 20) == (graphs != "none")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_triton_kernels_that_there_are(checkpoint, logits_of):
    """Interpreted, in replayed graphs, where attention knows the batch from the device alone."""
    work = requests(3, longest=12, max_tokens=6)
    expected, outputs = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, triton=True, rows=3, budget=16)
    assert dict(engine._runner._model.context.kernels.names)["step_inputs"] == "triton"
    logits, found = logits_of(engine, work, idle_every=2)
    assert len(engine.device.replays) > 3
    assert found.keys() == outputs.keys()
    for key, row in expected.items():
        torch.testing.assert_close(logits[key], row, atol=1e-4, rtol=1e-4)


def test_preempted_requests_too(checkpoint, logits_of):
    work = requests(8, seed=5, max_tokens=60, longest=20)
    expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, kv_bytes=1 << 17)
    found = logits_of(engine, work, idle_every=3)
    assert engine.stats().preemptions > 0
    assert_same(expected, found)


def test_rows_that_stop_or_are_aborted_and_used_again_with_a_step_in_flight(checkpoint, logits_of):
    """Surplus tokens, last tokens and block tables of one request never reach the next."""
    stops = tuple(range(0, VOCAB_SIZE, 6))
    work = [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(
                request.sampling, stop_token_ids=stops, min_tokens=0, max_tokens=12
            ),
        )
        for request in requests(9, seed=9, longest=15)
    ]
    _, expected = logits_of(cpu_engine(checkpoint), work)
    last_tokens = [[t for t in found if isinstance(t, int)][-1] for found in expected.values()]
    assert sum(token in stops for token in last_tokens) >= 4
    engine = cuda_engine(checkpoint, rows=3)
    step, aborts = engine.step, iter([None, None, "1", None, None, "4", None, None, "5"])
    aborted = set()

    def step_and_abort():
        if (request_id := next(aborts, None)) is not None:
            aborted.add(request_id)
            engine.abort(request_id)
        return step()

    engine.step = step_and_abort
    _, found = logits_of(engine, work)
    for key, outputs in expected.items():
        if key in aborted:
            assert found[key] == outputs[: len(found[key])]
        else:
            assert found[key] == outputs
    assert any(len(found[key]) < len(expected[key]) for key in aborted)
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("limit", [3, 9])
def test_a_step_without_memory_is_computed_in_halves(checkpoint, logits_of, monkeypatch, limit):
    """A device that has memory for no more than `limit` tokens."""
    work = requests(5, seed=3, longest=30)
    expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, graphs=False)
    forward = engine._runner._forward

    def scarce(inputs, batch):
        if batch is not None and batch.num_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(inputs, batch)

    monkeypatch.setattr(engine._runner, "_forward", scarce)
    assert_same(expected, logits_of(engine, work))
    assert engine.stats().oom_retries > 5


def test_halves_are_the_whole():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = np.sort(rng.permutation(20)[: rng.integers(1, 9)])
        counts = rng.integers(1, 6, len(rows)).astype(np.int32)
        if counts.sum() == 1:
            continue
        starts = rng.integers(0, 30, len(rows)).astype(np.int32)
        batch = ScheduledBatch(
            rows=rows,
            generations=rows * 10,
            starts=starts,
            num_scheduled=counts,
            samples=rng.random(len(rows)) < 0.5,
            num_tokens=int(counts.sum()),
        )
        tokens, sampling = [], []
        for half in halves(batch):
            assert half.num_tokens == half.num_scheduled.sum() > 0
            columns = (half.rows, half.starts, half.num_scheduled)
            for row, start, count in zip(*columns, strict=True):
                tokens += [(row, start + index) for index in range(count)]
            sampling += half.rows[half.samples].tolist()
        whole = zip(rows, starts, counts, strict=True)
        assert tokens == [(row, start + i) for row, start, count in whole for i in range(count)]
        assert sampling == rows[batch.samples].tolist()


def launched(engine: Engine, count: int) -> ScheduledBatch:
    """The first step of some requests, scheduled."""
    for handle, request in enumerate(requests(count)):
        engine.add(request, handle)
    return engine._scheduler.schedule()


def test_pinned_memory_is_used_again_only_when_the_device_is_through_with_it(checkpoint):
    engine = cuda_engine(checkpoint, graphs=False)
    batch = launched(engine, 8)
    steps = [engine._runner.launch(batch) for _ in range(5)]  # the fake checks what it copies
    assert engine.device.waits_in_launch >= 3
    results = [step.result() for step in reversed(steps)]
    for result in results:
        assert result.token_ids.tolist() == results[0].token_ids.tolist()
        assert (result.token_ids >= 0).all() and len(result.token_ids) > 0


def test_rows_without_a_distribution_end_their_requests_only(checkpoint, logits_of, monkeypatch):
    work = requests(6, seed=4)
    _, expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, graphs=False)
    sample = sampling_ops.sample_tokens

    def break_one(logits, **columns):
        logits[columns["seeds"] == 1] = torch.nan
        return sample(logits, **columns)

    monkeypatch.setattr(sampling_ops, "sample_tokens", break_one)
    _, outputs = logits_of(engine, work)
    assert outputs.pop("1") == []
    expected.pop("1")
    assert outputs == expected


def test_only_what_moved_on_is_sent(checkpoint, monkeypatch):
    engine = cuda_engine(checkpoint, graphs=False, budget=128)
    copied: list[int] = []
    copy = engine.device.copy
    monkeypatch.setattr(
        engine.device,
        "copy",
        lambda source, target: (
            copied.append(len(source)) if engine.device.is_pinned(source) else None,
            copy(source, target),
        ),
    )
    prompt = list(range(1, 103))
    sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    engine.add(GenerateRequest(request_id="0", prompt_token_ids=prompt, sampling=sampling), 0)
    while engine.has_work:
        engine.step()
    fixed = 20 + 16  # lengths of 16 rows
    first, *decode = copied
    assert first == fixed + 104 + 4 + 2 * (26 + 6)  # tokens, sampling row, blocks and parameters
    assert set(decode) == {fixed + 8 + 4, fixed + 8 + 4 + 4 + 4}  # now and then a block
    assert decode.count(fixed + 8 + 4 + 4 + 4) == 2


def test_a_size_that_is_missed_often_is_captured_under_load(checkpoint, logits_of):
    engine = cuda_engine(checkpoint)
    assert engine._runner.idle() and engine._runner.graphs.captured == [64]
    logits_of(engine, requests(6, max_tokens=40))
    assert 8 in engine._runner.graphs.captured


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("captured")])
def test_without_graphs_steps_run_op_by_op(checkpoint, logits_of, monkeypatch, error, caplog):
    def fail(run):
        raise error

    work = requests(4)
    expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint)
    monkeypatch.setattr(engine.device, "capture", fail)
    assert not engine._runner.idle() and not engine._runner.idle()
    assert_same(expected, logits_of(engine, work))
    assert engine.device.replays == []
    assert caplog.text.count("No CUDA graph of 64 tokens") == 1


def test_a_pool_that_grows_ends_capturing(checkpoint, caplog):
    engine = cuda_engine(checkpoint)
    engine.device.growth = [1 << 30, 1 << 20, 40 << 20]
    runner = engine._runner
    assert [runner.idle() for _ in range(4)] == [True, True, False, False]
    assert (len(runner.graphs.captured), runner.graphs.pool_growth) == (3, 41 << 20)
    assert "grew by 42991616 bytes" in caplog.text


def test_the_first_capture_makes_room_for_the_others(checkpoint, monkeypatch):
    """In the pool, so within the capture: blocks of both kinds that torch's allocator has."""
    reserved: list[bool] = []
    engine = cuda_engine(checkpoint)
    runner, device = engine._runner, engine.device
    capture, within = device.capture, []

    def watched(run):
        within.append(True)
        graph = capture(run)
        within.pop()
        return graph

    monkeypatch.setattr(device, "capture", watched)
    reserve = runner._reserve_spare_blocks
    monkeypatch.setattr(
        runner, "_reserve_spare_blocks", lambda: (reserved.append(bool(within)), reserve())
    )
    while runner.idle():
        pass
    assert reserved == [True] and runner.graphs.pool_growth == 0
    assert sum(size <= 1 << 20 for size in POOL_SPARE_BLOCKS) == 16
    assert max(POOL_SPARE_BLOCKS) > 1 << 20


def test_the_largest_step_is_measured(checkpoint):
    engine = cuda_engine(checkpoint)
    device = engine.device
    model = engine._runner._model
    free = iter([900, 700, 640])
    device.free_bytes = lambda: next(free)
    device.release_unused = lambda: None
    device.growth = [40]
    sizes: list[tuple[int, ...]] = []

    def make(running, num_blocks):
        runner = CudaRunner(
            model, running, device, num_blocks=num_blocks, block_size=4, kv_dtype=torch.float32,
            pad_to=8, max_num_batched_tokens=64,
        )  # fmt: skip
        sizes.append(runner.graphs.sizes)
        return runner

    estimate = MemoryBudget(total=1000, others=20, weights=1, activations=1, graphs=1)
    running = RunningRequests(16, 256, 4, ())
    measured = measured_budget(estimate, make, device, running, 64)
    # A first graph of 60 bytes, 40 of them in the pool that all share: 20 for each of the others.
    assert sizes == [(8, 16, 24, 32, 40, 48, 56, 64)]
    assert (measured.weights, measured.activations) == (80, 200)
    assert (measured.graphs, measured.is_measured) == (60 + 7 * 20, True)
    assert measured.free == 1000 - 20 - 80 - 200 - 200
    assert measured.kv_cache == measured.free - 100
