from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace_kernels.testing import RAGGED_LENGTHS, Tolerance, assert_close, ragged_batch

EXACT = Tolerance(0.0, 1e-3, "of a test")


def test_the_worst_element_is_named() -> None:
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[0, 1], actual[1, 2] = 0.1, -0.5
    with pytest.raises(AssertionError, match=r"2 of 6 .* worst at \(1, 2\): -0.5 instead of 0.0"):
        assert_close(actual, expected, EXACT)


def test_nan_and_infinity_come_first() -> None:
    expected = torch.tensor([1.0, float("inf"), float("nan")])
    assert_close(expected.clone(), expected, EXACT)
    with pytest.raises(AssertionError, match=r"NaN in one .* first at \(0,\)"):
        assert_close(torch.tensor([float("nan"), float("inf"), float("nan")]), expected, EXACT)
    with pytest.raises(AssertionError, match="infinity in one"):
        assert_close(torch.tensor([1.0, 2.0, float("nan")]), expected, EXACT)


@pytest.mark.parametrize("lengths", RAGGED_LENGTHS.values(), ids=RAGGED_LENGTHS.keys())
def test_slots_are_unique_and_rows_come_in_eights(lengths: list[tuple[int, int]]) -> None:
    batch = ragged_batch(lengths, 16, np.random.default_rng(0))
    assert batch.num_rows % 8 == 0 and batch.num_rows > 0
    slots = [slot for request in range(len(lengths)) for slot in batch.slots_of(request)]
    assert len(set(slots)) == len(slots)
    assert set(batch.slot_mapping[batch.slot_mapping >= 0]) <= set(slots)
    assert (batch.slot_mapping >= 0).sum() == sum(query for query, _ in lengths)
