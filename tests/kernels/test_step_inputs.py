"""Inputs made on the device: reference and Triton against plain Python, for ragged batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace_kernels import dispatch
from headrace_kernels.ops import step_inputs as ops
from headrace_kernels.testing import RAGGED_LENGTHS, ragged_batch

PAGE = 16


@pytest.fixture(params=["reference", "triton"])
def candidate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    explicit = dict.fromkeys(dispatch.OPS, "reference") | {"step_inputs": request.param}
    chosen = dispatch.choose(
        dispatch.KernelFacts(
            device="cpu", arch="x86_64", dtype=torch.float32, head_dim=64, page_size=PAGE
        ),
        explicit,
    )
    monkeypatch.setattr(dispatch, "_automatic", lambda facts: chosen)
    return request.param


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poisoned(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full(shape, -7, dtype=dtype)


@pytest.mark.parametrize("name", RAGGED_LENGTHS)
def test_tokens_positions_and_slots(candidate, rng, name):
    lengths = [*RAGGED_LENGTHS[name], (0, 0)]
    batch = ragged_batch(lengths, PAGE, rng, pad_to=8)
    metadata = batch.metadata()
    count = int(batch.query_lens.sum())
    tokens = rng.integers(1, 1000, batch.num_rows).astype(np.int32)
    last = rng.integers(1, 1000, len(lengths)).astype(np.int32)
    expected = tokens.copy()
    for row, (query, _) in enumerate(lengths):
        end = int(batch.query_lens[: row + 1].sum())
        if query == 1:
            tokens[end - 1], expected[end - 1] = -1, last[row]
    expected[count:] = 0
    token_ids, positions, slots = (poisoned(batch.num_rows) for _ in range(3))
    ops.token_inputs(
        metadata.query_start_loc,
        metadata.seq_lens,
        torch.from_numpy(tokens),
        torch.from_numpy(last),
        metadata.block_table,
        PAGE,
        token_ids,
        positions,
        slots,
    )
    assert token_ids.tolist() == expected.tolist()
    assert positions.tolist() == batch.positions.tolist()
    assert slots.tolist() == batch.slot_mapping.tolist()


def test_more_tokens_than_a_program_takes(candidate, rng):
    lengths = [(int(query), int(query) + 40) for query in rng.integers(0, 9, 70)]
    batch = ragged_batch(lengths, PAGE, rng, pad_to=64)
    metadata = batch.metadata()
    token_ids, positions, slots = (poisoned(batch.num_rows) for _ in range(3))
    sent = torch.arange(batch.num_rows, dtype=torch.int32)
    last = torch.zeros(len(lengths), dtype=torch.int32)
    arrays = (metadata.query_start_loc, metadata.seq_lens, sent, last, metadata.block_table)
    ops.token_inputs(*arrays, PAGE, token_ids, positions, slots)
    assert batch.num_rows > 256
    assert positions.tolist() == batch.positions.tolist()
    assert slots.tolist() == batch.slot_mapping.tolist()


def test_a_row_without_a_distribution_reads_no_embedding_outside(candidate):
    token_ids, positions, slots = (poisoned(2) for _ in range(3))
    table = torch.full((2, 3), 5, dtype=torch.int32)
    ops.token_inputs(
        ints(0, 1, 2), ints(4, 20), ints(-1, -1), ints(-1, 9), table, PAGE, token_ids, positions,
        slots,
    )  # fmt: skip
    assert token_ids.tolist() == [0, 9]
    assert positions.tolist() == [3, 19]
    assert slots.tolist() == [5 * PAGE + 3, 5 * PAGE + 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_put(candidate, rng, dtype, count):
    out = torch.arange(1000, dtype=torch.int32)
    index = rng.permutation(1000)[:count].astype(np.int32)
    values = rng.integers(-(2**31), 2**31, count)
    expected = out.numpy().copy()
    expected[index] = values
    ops.put(torch.from_numpy(index), torch.from_numpy(values).to(dtype), out)
    assert out.tolist() == expected.tolist()


def test_sampling_columns_keep_their_bits(candidate):
    columns = {
        "temperature": torch.tensor([0.0, 0.7, 1e-30]),
        "top_k": ints(0, 50, 2**31 - 1),
        "top_p": torch.tensor([1.0, 0.95, 1e-6]),
        "min_p": torch.tensor([0.0, 0.05, 1.0]),
        "seeds": torch.tensor([0, -1, 2**62 + 12345]),
    }
    floats = ("temperature", "top_p", "min_p")
    bits = {name: columns[name].view(torch.int32) for name in floats}
    halves = columns["seeds"].view(torch.int32).view(3, 2)
    words = torch.stack(
        (bits["temperature"], columns["top_k"], bits["top_p"], bits["min_p"], *halves.T), dim=1
    )
    rows = ints(2, 0)
    found = {
        "logit_indices": poisoned(2),
        "temperature": torch.full((2,), torch.nan),
        "top_k": poisoned(2, dtype=torch.int32),
        "top_p": torch.full((2,), torch.nan),
        "min_p": torch.full((2,), torch.nan),
        "seeds": poisoned(2),
        "positions": poisoned(2),
    }
    ops.sampling_inputs(rows, ints(0, 3, 3, 4), ints(10, 0, 7), words.contiguous(), **found)
    assert found["logit_indices"].tolist() == [3, 2]
    assert found["positions"].tolist() == [7, 10]
    for name, column in columns.items():
        assert found[name].tolist() == column[rows].tolist(), name


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="index must be torch.int32"):
        ops.put(torch.zeros(1, dtype=torch.int64), ints(1), ints(0, 0))
    with pytest.raises(ValueError, match="words must have shape"):
        columns = [torch.zeros(1)] * 7
        ops.sampling_inputs(ints(0), ints(0, 1), ints(1), ints(0), *columns)
