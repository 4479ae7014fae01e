"""Steps recorded once and replayed in one native call: the CPU's counterpart of CUDA graphs.

Dispatching an op from Python costs more than computing it for one token. A recording keeps each
op's pointers and sizes; csrc/include/headrace/cpu/tape.h says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "headrace"
Result = TypeVar("Result")


class Tape:
    """The native ops that a function ran. They read and write the memory that they did then."""

    def __init__(self, number: int, memory: Sequence[Tensor]) -> None:
        self._number = number
        self._memory = memory
        self._replay = torch.ops.headrace.replay.default

    def replay(self) -> None:
        """Run them again, in order. Raises RuntimeError where one refuses what it reads."""
        self._replay(self._number)

    def __len__(self) -> int:
        return int(torch.ops.headrace.recorded_operations(self._number))

    def __del__(self) -> None:
        torch.ops.headrace.forget_recording(self._number)


class NotRecordable(Exception):
    """The function did something that a replay would leave out; it names the torch ops."""


def record(function: Callable[[], Result]) -> tuple[Tape, Result]:
    """Call `function` and record its native ops.

    Raises NotRecordable, after the call, if it used other ops of torch than views. The tape keeps
    the tensors that the ops were given.
    """
    torch.ops.headrace.begin_recording()
    try:
        with _Watcher() as watcher:
            result = function()
        if watcher.other_ops:
            raise NotRecordable(", ".join(sorted(watcher.other_ops)))
        return Tape(torch.ops.headrace.end_recording(), watcher.memory), result
    finally:
        torch.ops.headrace.drop_recording()


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the tensors of our ops, and the other ops that compute, copy or allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.other_ops: set[str] = set()
        self.memory: list[Tensor] = []

    def see(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == NAMESPACE:
            self.memory.extend(argument for argument in args if isinstance(argument, Tensor))
        elif not func.is_view:
            self.other_ops.add(str(func))
        return func(*args, **(kwargs or {}))


# Not in the class: torch would wrap it in a function that imports its compiler, for a second.
_Watcher.__torch_dispatch__ = _Watcher.see  # type: ignore[method-assign, assignment]
