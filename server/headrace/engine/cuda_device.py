"""What the runner asks of a GPU: a stream, events, pinned memory, graphs. Knows nothing of models.

Tests run the same runner over a device that computes on the CPU and checks the order of things.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the stream."""

    def record(self) -> None:
        """Move it behind all that has been enqueued."""
        ...

    def done(self) -> bool:
        """Whether the device has come past it. Does not wait."""
        ...

    def wait(self) -> None:
        """Block until it has."""
        ...


class Graph(Protocol):
    """A captured piece of work, which reads and writes the memory it did when it was captured."""

    def replay(self) -> None: ...


class CudaDevice(Protocol):
    """All work is enqueued on one stream, and runs in that order."""

    torch_device: torch.device

    def stream(self) -> AbstractContextManager[object]:
        """What is launched inside is enqueued."""
        ...

    def event(self) -> Event: ...

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] on the host, uninitialized, which copies reach without the host waiting."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueue target = source. One is pinned: it is not to be touched, and not to be read,
        before an event behind the copy is done."""
        ...

    def capture(self, run: Callable[[], None]) -> Graph:
        """What `run` enqueues, kept instead of run; all graphs share one pool of memory. The
        kernels must have run before. Raises torch.OutOfMemoryError."""
        ...

    def reserved_bytes(self) -> int:
        """Memory that this process holds for tensors, used or not."""
        ...

    def free_bytes(self) -> int:
        """Memory that nobody holds."""
        ...

    def release_unused(self) -> None:
        """Give back what the process holds for tensors and does not use, and begin another pool:
        there are no graphs. Blocks."""
        ...


class TorchCudaDevice:
    """CudaDevice by way of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def event(self) -> Event:
        return _TorchEvent(self._stream)

    def pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def capture(self, run: Callable[[], None]) -> Graph:
        # Not torch.cuda.graph: that waits for the device and gives all cached memory back first,
        # each time. But nothing may free device memory of another graph, or an event, meanwhile.
        graph = torch.cuda.CUDAGraph()
        with _no_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a broken capture cannot end well
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.torch_device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def release_unused(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        gc.collect()
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()


class _TorchEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # The engine's thread sleeps while it waits, and leaves its core to others.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream = stream

    def record(self) -> None:
        self._event.record(self._stream)

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()


@contextlib.contextmanager
def _no_collection():  # type: ignore[no-untyped-def]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
