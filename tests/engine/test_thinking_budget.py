"""The end of thinking is forced when its budget is used up, whatever happens to the request."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.engine.sampling_batch import sampling_columns
from headrace.engine.token_masks import allows
from headrace.engine.token_rules import ThinkingEnd
from headrace.sampling_params import ThinkingBudget

BEGIN, END = 900, 901
PROMPT = [1, 2, 3]


def begun(max_tokens: int) -> ThinkingBudget:
    return ThinkingBudget(max_tokens, None, END)


@pytest.mark.parametrize(
    ("begin_id", "output", "forced"),
    [
        (None, [], False),
        (None, [5, 6], False),
        (None, [5, 6, 7], True),
        (None, [5, 6, 7, 8], True),  # what forced it was not heeded
        (None, [5, 6, 7, END], False),
        (None, [5, END, 7, 8, 9], False),
        (BEGIN, [], False),
        (BEGIN, [BEGIN, 5, 6], False),
        (BEGIN, [BEGIN, 5, 6, 7], True),
        (BEGIN, [5, 6, 7, 8], False),
        (BEGIN, [5, BEGIN, 6, 7, 8, 9], False),
    ],
)
def test_what_follows_from_the_tokens(
    begin_id: int | None, output: list[int], forced: bool
) -> None:
    rule = ThinkingEnd(ThinkingBudget(3, begin_id, END))
    ids = rule.next_to(np.array(output, np.int32))
    assert (ids is None) is not forced
    if ids is not None:
        assert ids.tolist() == [END]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 4])
def test_the_end_is_forced_once(make_harness, expected, overlaps, budget):
    harness = make_harness(overlaps=overlaps)
    harness.add("a", PROMPT, max_tokens=9, thinking=begun(budget))
    harness.add("b", [4, 5], max_tokens=9)
    harness.run()
    before = expected(PROMPT, budget)
    after = expected([*PROMPT, *before, END], 8 - budget)
    assert harness.tokens["a"] == [*before, END, *after]
    assert harness.tokens["b"] == expected([4, 5], 9)


def test_no_step_is_skipped_before_the_budget_is_used_up(make_harness):
    free = make_harness(overlaps=True)
    free.add("a", PROMPT, max_tokens=9)
    free.run()
    bound = make_harness(overlaps=True)
    bound.add("a", PROMPT, max_tokens=9, thinking=begun(9))
    bound.run()
    assert bound.tokens == free.tokens
    assert len(bound.runner.batches) == len(free.runner.batches)


def test_a_ban_of_the_end_does_not_hold_then(make_harness):
    harness = make_harness()
    harness.add("a", PROMPT, max_tokens=5, thinking=begun(2), banned=[[END]])
    harness.run()
    assert harness.tokens["a"][2] == END


@pytest.mark.parametrize("overlaps", [False, True])
def test_preemption_and_replay_change_nothing(make_harness, overlaps):
    whole = make_harness(overlaps=overlaps)
    whole.add("a", PROMPT, max_tokens=12, thinking=begun(5))
    whole.run()
    assert whole.tokens["a"][5] == END
    for made in (3, 5, 6, 9):
        replayed = make_harness(overlaps=overlaps)
        resume = whole.tokens["a"][:made]
        replayed.add("a", PROMPT, max_tokens=12, thinking=begun(5), resume=resume)
        replayed.run()
        assert [*resume, *replayed.tokens["a"]] == whole.tokens["a"]
    crowded = make_harness(overlaps=overlaps, num_blocks=8, prefix_caching=False)
    for name in ("first", "a"):
        crowded.add(name, PROMPT, max_tokens=12, thinking=begun(5))
    crowded.add("third", PROMPT, max_tokens=12, thinking=begun(5))
    crowded.run()
    assert crowded.scheduler.num_preemptions > 0
    assert set(map(tuple, crowded.tokens.values())) == {tuple(whole.tokens["a"])}


@pytest.mark.parametrize("may_end", [False, True])
def test_a_grammar_finishes_a_character_first(make_harness, monkeypatch, may_end):
    """Where its mask lacks the end, the end is not forced: no token would be left."""
    harness = make_harness()
    harness.add("a", PROMPT, max_tokens=5, thinking=begun(0))
    harness.step()
    running = harness.running
    [row] = running.rows().tolist()
    running.token_ids[row, len(PROMPT)] = 7  # as if the end had not been forced
    mask = np.zeros(32, np.int32)
    mask[END // 32] = np.array(1 << END % 32 if may_end else 0, np.int64).astype(np.int32)
    running.constrained.add(row)
    monkeypatch.setattr(running.token_masks, "of", lambda _: mask)
    columns = sampling_columns(running, running.rows(), running.num_tokens[running.rows()])
    assert (0 in columns.allowed) is may_end


@pytest.mark.parametrize("token_id", [0, 31, 32, 95])
def test_a_bit_of_a_mask(token_id: int) -> None:
    bits = np.zeros(96, np.uint8)
    bits[token_id] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    assert [other for other in range(96) if allows(mask, other)] == [token_id]
