"""Which tokens grammars allow in a step's rows: found in another thread while the model runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headrace.engine.grammar import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor

MaskArray = NDArray[np.int32]
BITS = 32


class TokenMasks:
    """The masks of one step at a time, of rows of one vocabulary."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._pending: Future[MaskArray] | None = None
        self._index: dict[int, int] = {}

    def start(self, constraints: Mapping[int, Constraint]) -> None:
        """Find the masks of these rows. Nothing else may use the constraints until `of` is done."""
        self._index = {row: index for index, row in enumerate(constraints)}
        self._pending = None
        if not constraints:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "token-masks")
        self._pending = self._thread.submit(self._fill, list(constraints.values()))

    def of(self, row: int) -> MaskArray | None:
        """[ceil(V / 32)] bit i of word w is set where token 32 w + i may come next, in a row of the
        step. None: any may. Waits for the thread."""
        index = self._index.get(row)
        if index is None or self._pending is None:
            return None
        mask: MaskArray = self._pending.result()[index]
        return mask

    def _fill(self, constraints: Sequence[Constraint]) -> MaskArray:
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor()
        words = -(-constraints[0].vocab_size // BITS)
        masks = np.zeros((len(constraints), words), np.int32)
        self._executor.unsafe_compute_mask_ptr(
            [(constraint.matcher, index) for index, constraint in enumerate(constraints)],
            masks.ctypes.data,
            words * masks.itemsize,
            len(constraints),
        )
        for constraint in constraints:
            constraint.note_error()  # the row ends when it is filed, whatever is sampled
        return masks


def allows(mask: MaskArray, token_id: int) -> bool:
    return bool(int(mask[token_id // BITS]) >> token_id % BITS & 1)


def without(mask: MaskArray, token_ids: Collection[int]) -> MaskArray:
    """The mask without these tokens, if it has others."""
    less = mask.copy()
    bits = less.view(np.uint32)
    for token_id in token_ids:
        bits[token_id // BITS] &= ~np.uint32(1 << token_id % BITS)
    return less if less.any() else mask


def mask_logits(logits: NDArray[np.float32], mask: MaskArray) -> None:
    """Set logits [V] of tokens that a mask does not allow to -inf, in place. What is no number
    stays that where it is allowed."""
    bits = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    np.copyto(logits, -np.inf, where=bits == 0)
