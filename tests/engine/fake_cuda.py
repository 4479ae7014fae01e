"""A CudaDevice that computes on the CPU and checks the order of things, for the runner's tests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from headrace_kernels import dispatch
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.reference import attention as reference_attention

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
        with _disable_current_modes():
            self._run_until(position)

    def _run_until(self, position: int) -> None:
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
        names = dict.fromkeys(names, "test")
    return dataclasses.replace(kernels, **functions, names=tuple(names.items()))


def triton_kernels() -> KernelSet:
    """Interpreted kernels of all stems that have them; references of the others, as they are on a
    device of their own."""
    facts = dispatch.KernelFacts(
        device="cpu", arch="x86_64", dtype=torch.float32, head_dim=16, page_size=4
    )
    explicit = dict.fromkeys(dispatch.OPS, "reference")
    for decision in dispatch.explain(facts):
        if decision.candidate == "triton" and decision.reason.startswith("never run on"):
            explicit[decision.stem] = "triton"
    chosen = dispatch.choose(facts, explicit)
    kernels = fake_kernels(chosen, capturable=explicit["attention"] == "reference")
    return dataclasses.replace(kernels, names=chosen.names)
