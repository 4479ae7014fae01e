"""Which tokens a request may not sample, or must, in arrays that a step can use as they are.

All follows from the tokens of the output, so that it outlives preemption and replay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.sampling_params import ThinkingBudget

LongArray = NDArray[np.int64]


class BannedSequences:
    """Token sequences that may not be completed in the output: words, as the text side spells
    them. A sequence of one token bans that token."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        """`sequences`: none is empty."""
        self._always = _ids({sequence[0] for sequence in sequences if len(sequence) == 1})
        # By the token before the last one, so that a step looks at few of many sequences.
        self._after: dict[int, list[LongArray]] = defaultdict(list)
        for sequence in sequences:
            if len(sequence) > 1:
                self._after[sequence[-2]].append(np.array(sequence, np.int64))

    @property
    def looks_back(self) -> bool:
        """Whether what is banned depends on the tokens before."""
        return bool(self._after)

    def next_to(self, output_ids: NDArray[np.integer]) -> LongArray:
        """[N] the tokens that would complete a sequence after `output_ids`."""
        if not self._after or not len(output_ids):
            return self._always
        completing = {
            int(sequence[-1])
            for sequence in self._after.get(int(output_ids[-1]), ())
            if np.array_equal(output_ids[-len(sequence) + 1 :], sequence[:-1])
        }
        return np.concatenate((self._always, _ids(completing))) if completing else self._always


class ThinkingEnd:
    """The marker that ends what a model thinks, when its budget is used up."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._end = np.array([budget.end_id], np.int64)

    def next_to(self, output_ids: NDArray[np.integer]) -> LongArray | None:
        """[1] the only token that may follow `output_ids`; None: any may. Looks at tokens behind
        the first one only when there are `max_tokens` of them."""
        begin_id = self._budget.begin_id
        if begin_id is not None:
            if not len(output_ids) or output_ids[0] != begin_id:
                return None
            output_ids = output_ids[1:]
        if len(output_ids) < self._budget.max_tokens or self._budget.end_id in output_ids:
            return None
        return self._end


def _ids(token_ids: set[int]) -> LongArray:
    return np.fromiter(sorted(token_ids), np.int64, len(token_ids))
