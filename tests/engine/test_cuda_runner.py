"""The GPU's runner over a device that computes on the CPU: bits, order, graphs, memory.

Everything but CUDA itself runs: inputs made on the device, graphs, overlap, the way of the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.build import build_engine
from headrace.engine.cuda_runner import CudaRunner
from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels import dispatch
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.ops import sampling as sampling_ops
from headrace_kernels.reference import attention as reference_attention

VOCAB_SIZE = 160  # of the checkpoint in conftest.py
POISON = -77
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class FakeDevice:
    """A CudaDevice on the CPU. Work runs when it is enqueued, but copies to the host arrive, and
    events are done, only when somebody waits: until then pinned memory holds poison."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.enqueued = self.done = 0
        self.launching = False
        self.waits_in_launch = 0
        self.replays: list[int] = []
        self.reserved = 0
        self.growth: list[int] = []
        """Bytes that each of the next captures reserves."""
        self.pinned_memory: set[int] = set()
        self._keep: list[torch.Tensor] = []
        self._transfers: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = []

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        self.launching = True
        with NoWaiting(self):
            yield
        self.launching = False

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.full((size,), POISON, dtype=dtype)
        self._keep.append(tensor)
        self.pinned_memory.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned_memory

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert source.shape == target.shape and source.dtype == target.dtype
        assert self.is_pinned(source) != self.is_pinned(target), "one of them is pinned"
        self.enqueued += 1
        arrives = self.is_pinned(target)
        snapshot = source.clone()
        target.copy_(source) if not arrives else target.fill_(POISON)
        pinned = target if arrives else source
        self._transfers.append((self.enqueued, pinned, snapshot, arrives))

    def capture(self, run: Callable[[], None]) -> FakeGraph:
        self.reserved += self.growth.pop(0) if self.growth else 0
        run()
        return FakeGraph(self, run)

    def reserved_bytes(self) -> int:
        return self.reserved

    @torch.inference_mode()
    def run_until(self, position: int) -> None:
        self.done = max(self.done, position)
        while self._transfers and self._transfers[0][0] <= position:
            _, pinned, snapshot, arrives = self._transfers.pop(0)
            if arrives:
                assert (pinned == POISON).all(), "written before it arrived"
                pinned.copy_(snapshot)
            else:
                assert torch.equal(pinned, snapshot), "changed while it was on its way"


@dataclasses.dataclass
class FakeEvent:
    device: FakeDevice
    position: int = 0

    def record(self) -> None:
        self.device.enqueued += 1
        self.position = self.device.enqueued

    def done(self) -> bool:
        return self.device.done >= self.position

    def wait(self) -> None:
        if self.device.launching and not self.done():
            self.device.waits_in_launch += 1
        self.device.run_until(self.position)


@dataclasses.dataclass
class FakeGraph:
    device: FakeDevice
    run: Callable[[], None]

    def replay(self) -> None:
        self.device.enqueued += 1
        self.device.replays.append(self.device.enqueued)
        self.run()


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU, but for kernels, which are references."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in WAITING, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._methods = {name: getattr(torch.Tensor, name) for name in ("numpy", "tolist", "cpu")}
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._checked(name, method))
        return super().__enter__()

    def __exit__(self, *exc: object):
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*exc)

    def _checked(self, name, method):
        def checked(tensor, *args):
            assert not in_launch() or self._device.is_pinned(tensor), f"{name}() waits"
            return method(tensor, *args)

        return checked


def in_launch() -> bool:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return bool(_get_current_dispatch_mode_stack())


def unchecked(kernel: Callable[..., None]) -> Callable[..., None]:
    def run(*args, **kwargs):
        with _disable_current_modes():
            kernel(*args, **kwargs)

    return run


def attention_from_device(q, kv_cache, metadata, *args) -> None:
    """The reference, from nothing but the device's tensors: right when it is replayed."""
    query_lens = np.diff(metadata.query_start_loc.numpy())
    arrays = (metadata.seq_lens, metadata.block_table, metadata.slot_mapping)
    own = AttentionMetadata.build(query_lens, *(array.numpy() for array in arrays), "cpu")
    reference_attention.paged_attention(q, kv_cache, own, *args)


def fake_kernels(kernels: KernelSet, *, capturable: bool) -> KernelSet:
    functions = {
        field.name: unchecked(getattr(kernels, field.name))
        for field in dataclasses.fields(kernels)
        if field.name not in ("names", "batch_invariant")
    }
    names = dict(kernels.names)
    if capturable:
        functions["paged_attention"] = unchecked(attention_from_device)
        names["attention"] = "test"
    return dataclasses.replace(kernels, **functions, names=tuple(names.items()))


def cpu_engine(checkpoint, *, budget: int = 64, rows: int = 16, kv_bytes: int = 1 << 21) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(checkpoint),
            model_options=ModelOptions(dtype="float32", max_model_len=256),
            cache=CacheOptions(kv_cache_memory_bytes=kv_bytes, block_size=4),
            scheduler=SchedulerOptions(max_num_seqs=rows, max_num_batched_tokens=budget),
            device=DeviceOptions(
                device="cpu", threads=1, kernel=tuple(f"{stem}=reference" for stem in dispatch.OPS)
            ),
        )
    )


def cuda_engine(checkpoint, *, graphs: bool = True, budget: int = 64, **options) -> Engine:
    """The same engine with the other runner; `engine.device` is the fake."""
    engine = cpu_engine(checkpoint, budget=budget, **options)
    model = engine._runner._model
    model.context.kernels = fake_kernels(model.context.kernels, capturable=graphs)
    engine.device = FakeDevice()
    engine._runner = CudaRunner(
        model,
        engine._scheduler.running,
        engine.device,
        num_blocks=engine.info.num_blocks,
        block_size=4,
        kv_dtype=torch.float32,
        pad_to=8,
        max_num_batched_tokens=budget,
        graphs=graphs,
    )
    return engine


def requests(count: int, seed: int = 2) -> list[GenerateRequest]:
    """Ragged prompts, some with a common beginning, and every way to sample."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, VOCAB_SIZE, 40).tolist()
    kinds = (
        {"temperature": 0.9, "top_p": 0.95},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "logprobs": 0},
        {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "logit_bias": {3: 4.0, 9: -50.0}, "prompt_logprobs": 2},
        {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": (7, 8, 9)},
    )
    made = []
    for index in range(count):
        own = rng.integers(1, VOCAB_SIZE, int(rng.integers(1, 60))).tolist()
        prompt = common[: int(rng.integers(10, 40))] + own if index % 2 else own
        sampling = SamplingParams(
            max_tokens=int(rng.integers(5, 12)), seed=index, **kinds[index % len(kinds)]
        )
        made.append(
            GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
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


@pytest.mark.parametrize(("graphs", "budget"), [("all", 64), ("few", 16), ("none", 40)])
def test_the_bits_of_the_cpu_runner(checkpoint, logits_of, graphs, budget):
    work = requests(14)
    expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, graphs=graphs != "none", budget=budget)
    while graphs == "all" and engine._runner.idle():
        pass
    engine.device.run_until(engine.device.enqueued)
    engine.device.waits_in_launch = 0
    found = logits_of(engine, work, idle_every=7 if graphs == "few" else 0)
    assert_same(expected, found)
    if graphs != "few":  # a capture between steps sends neutral inputs
        assert engine.device.waits_in_launch == 0
    assert (len(engine.device.replays) > 20) == (graphs != "none")


def test_preempted_requests_too(checkpoint, logits_of):
    work = requests(8, seed=5)
    expected = logits_of(cpu_engine(checkpoint), work)
    engine = cuda_engine(checkpoint, kv_bytes=1 << 17)
    found = logits_of(engine, work, idle_every=3)
    assert engine.stats().preemptions > 0
    assert_same(expected, found)
