"""Steps recorded once and replayed in one native call: the CPU's counterpart of CUDA graphs.

Dispatching an op from Python costs more than computing it for one token. A recording keeps each
op's pointers and sizes; csrc/include/headrace/cpu/tape.h says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "headrace"
Result = TypeVar("Result")


class Tape:
    """The native ops that a function ran. They read and write the memory that they did then."""

    def __init__(self, number: int) -> None:
        self._number = number
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

    Raises NotRecordable, after the call, if it used other ops of torch than views. Its tensors have
    to outlive the tape: the caller keeps them.
    """
    torch.ops.headrace.begin_recording()
    try:
        with _OtherOps() as others:
            result = function()
        if others.names:
            raise NotRecordable(", ".join(sorted(others.names)))
        return Tape(torch.ops.headrace.end_recording()), result
    finally:
        torch.ops.headrace.drop_recording()


class _OtherOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the ops that compute, copy or allocate, and are not ours."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not func.is_view and func.namespace != NAMESPACE:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
