"""One step in flight while the next is scheduled: what each row does meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.engine.client import FinishReason

EOS = 999


@pytest.fixture
def make_overlapping(make_harness):
    return lambda **options: make_harness(overlaps=True, **options)


def num_computed(harness) -> int:
    return sum(batch.num_tokens for batch in harness.runner.batches)


def test_the_next_step_is_launched_before_a_result_is_read(make_overlapping):
    harness = make_overlapping()
    harness.add("a", [1, 2, 3], max_tokens=4)
    _, outputs = harness.step()
    assert (outputs.handles, outputs.details) == ([], [])
    assert harness.runner.num_read == 0
    for step in range(1, 4):
        harness.step()
        assert (len(harness.runner.batches), harness.runner.num_read) == (step + 1, step)
        assert len(harness.tokens["a"]) == step
    assert harness.engine.has_work, "the last token is in flight"
    harness.step()
    assert not harness.engine.has_work
    assert len(harness.tokens["a"]) == 4


def test_a_row_that_ends_by_length_is_not_scheduled_beyond(make_overlapping, expected):
    harness = make_overlapping()
    harness.add("a", [1, 2, 3], max_tokens=5)
    harness.add("full", [4], max_tokens=None)
    harness.run()
    assert harness.tokens["a"] == expected([1, 2, 3], 5)
    assert harness.tokens["full"] == expected([4], 63)
    assert num_computed(harness) == 3 + 4 + 63, "the last token of neither is computed"


def test_the_surplus_token_of_a_row_that_stopped_is_dropped(make_overlapping, expected):
    harness = make_overlapping()
    prompt = [1, 2, 3]
    harness.add("stops", prompt, max_tokens=20, eos_at=4)
    while "stops" not in harness.ended:
        harness.step()
    assert harness.kv_cache.num_used_blocks == 0
    assert not harness.scheduler.has_work
    assert harness.engine.has_work, "the surplus step has not been collected"
    steps = harness.engine.stats().steps
    _, outputs = harness.step()
    assert (outputs.handles, outputs.details) == ([], [])
    assert not harness.engine.has_work
    assert harness.tokens["stops"] == [*expected(prompt, 4), 999]
    assert harness.ended["stops"].record.output_tokens == 5
    assert num_computed(harness) == 3 + 5, "the surplus token was computed"
    assert outputs.stats.steps == steps == 5, "and is not counted"
    assert outputs.stats.step_tokens == 1


def test_a_row_is_reused_while_its_surplus_token_is_in_flight(make_overlapping, expected):
    harness = make_overlapping(max_num_seqs=1)
    harness.add("stops", [1, 2, 3], max_tokens=20, eos_at=4)
    harness.add("next", [5, 6], max_tokens=6)
    while "stops" not in harness.ended:
        harness.step()
    batch, _ = harness.step()
    assert batch.num_tokens == 2, "the next request's prompt, before the surplus is collected"
    harness.run()
    assert harness.tokens["next"] == expected([5, 6], 6)


def test_what_a_surplus_token_wrote_is_not_published(make_overlapping):
    """Its KV fills a block, but the request has ended: nobody may find that block."""
    harness = make_overlapping(block_size=4)
    harness.add("stops", [1, 2, 3, 4, 5], max_tokens=20, eos_at=2)
    harness.run()
    assert num_computed(harness) == 8, "two blocks are full"
    whole = [1, 2, 3, 4, 5, *harness.tokens["stops"], 0]
    harness.add("same", whole, max_tokens=1)
    harness.run()
    assert harness.ended["same"].record.cached_tokens == 4


@pytest.mark.parametrize("steps", range(1, 6))
def test_an_abort_frees_blocks_while_a_step_is_in_flight(make_overlapping, expected, steps):
    harness = make_overlapping(budget=8)
    harness.add("aborted", list(range(20)), max_tokens=50)
    for _ in range(steps):
        harness.step()
    harness.engine.abort("aborted")
    harness.add("other", [7, 8], max_tokens=5)
    harness.step()
    ended = harness.ended["aborted"]
    assert ended.finish_reason is FinishReason.ABORT
    assert ended.record.output_tokens == len(harness.tokens["aborted"])
    assert harness.kv_cache.num_used_blocks == 1
    harness.run()
    assert harness.tokens["other"] == expected([7, 8], 5)


def test_preemption_of_rows_in_flight_loses_nothing(make_overlapping, expected):
    harness = make_overlapping(num_blocks=8, max_model_len=32, max_num_seqs=4, budget=32)
    prompts = {name: [index] * 6 for index, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=18)
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    for name, prompt in prompts.items():
        assert harness.tokens[name] == expected(prompt, 18)
        assert harness.ended[name].record.output_tokens == 18


def test_a_row_waits_for_blocks_that_are_about_to_be_freed(make_overlapping, expected):
    harness = make_overlapping(num_blocks=5, max_model_len=16, max_num_seqs=2)
    harness.add("ends", [1] * 7, max_tokens=3)
    harness.add("grows", [2] * 6, max_tokens=6)
    for _ in range(3):
        batch, _ = harness.step()
        assert len(batch) == 2
    assert harness.kv_cache.pool.num_free == 0
    # "ends" has its last token in flight, "grows" has filled its two blocks.
    batch, _ = harness.step()
    assert batch is None
    assert "ends" in harness.ended
    harness.run()
    assert harness.scheduler.num_preemptions == 0
    assert harness.tokens["grows"] == expected([2] * 6, 6)


def test_a_penalized_row_skips_the_step_that_does_not_know_its_token(make_overlapping):
    harness = make_overlapping()
    harness.add("penalized", [1], max_tokens=6, presence_penalty=1.0)
    harness.add("plain", [2], max_tokens=12)
    row_of = {}
    harness.step()
    for request_id in ("penalized", "plain"):
        row_of[request_id] = harness.scheduler._requests[request_id].row
    harness.run()
    scheduled = {
        name: [bool((batch.rows == row).any()) for batch in harness.runner.batches]
        for name, row in row_of.items()
    }
    assert scheduled["penalized"] == [True, False] * 6
    assert scheduled["plain"] == [True] * 12


def test_broken_logits_fail_only_their_own_request(make_overlapping, expected):
    harness = make_overlapping()
    harness.add("good", [1], max_tokens=6)
    harness.add("bad", [2], max_tokens=6, broken_at=2)
    harness.run()
    assert harness.ended["bad"].finish_reason is FinishReason.ERROR
    assert harness.tokens["bad"] == expected([2], 2)
    assert harness.tokens["good"] == expected([1], 6)


def test_prompt_logprobs_come_once_while_the_next_step_is_in_flight(make_overlapping):
    harness = make_overlapping(budget=8)
    prompt = list(range(20))
    harness.add("a", prompt, max_tokens=5, prompt_logprobs=0, logprobs=0)
    harness.run()
    assert harness.prompt_logprobs["a"] == [None, *(-token for token in prompt[1:])]
    assert harness.logprobs["a"] == [-token for token in harness.tokens["a"]]


def test_a_prefix_cache_reset_waits_for_requests_only(make_overlapping):
    harness = make_overlapping()
    harness.add("stops", list(range(8)), max_tokens=9, eos_at=1)
    harness.step()
    assert not harness.engine.reset_prefix_cache()
    while "stops" not in harness.ended:
        harness.step()
    assert harness.engine.has_work
    assert harness.engine.reset_prefix_cache()
    harness.run()
    harness.add("again", list(range(8)), max_tokens=1)
    harness.run()
    assert harness.ended["again"].record.cached_tokens == 0


def test_a_batch_says_all_that_a_step_needs_after_the_counts_have_moved_on(make_overlapping):
    harness = make_overlapping(budget=8)
    harness.add("a", list(range(11)), max_tokens=3)
    for _ in range(3):
        harness.step()
    first, second, third = harness.runner.batches
    assert [int(b.starts[0]) for b in (first, second, third)] == [0, 8, 11]
    assert [int(b.ends[0]) for b in (first, second, third)] == [8, 11, 12]
    assert [bool(b.samples[0]) for b in (first, second, third)] == [False, True, True]
    kept = second.kept(np.array([False]))
    assert (len(kept), kept.num_tokens) == (0, 0)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("eos_at", "ends"), [(2, False), (3, True)])
def test_end_tokens_are_banned_for_exactly_min_tokens(make_harness, overlaps, eos_at, ends):
    harness = make_harness(overlaps=overlaps)
    harness.add("a", [1, 2, 3], max_tokens=8, min_tokens=3, eos_at=eos_at)
    harness.run()
    assert len(harness.tokens["a"]) == (4 if ends else 8)


@pytest.mark.parametrize("overlaps", [False, True])
def test_banned_sequences_are_never_completed(make_harness, overlaps):
    free = make_harness(overlaps=overlaps)
    free.add("a", [1, 2, 3], max_tokens=8)
    free.add("b", [4, 5], max_tokens=8)
    free.run()
    a, b = free.tokens["a"], free.tokens["b"]

    harness = make_harness(overlaps=overlaps)
    # The second one begins in the prompt: only the output counts.
    harness.add("a", [1, 2, 3], max_tokens=8, banned=[a[2:5], [3, a[0]], [a[7], a[7]]])
    harness.add("b", [4, 5], max_tokens=8)
    harness.run()
    tokens = harness.tokens["a"]
    assert tokens[:4] == a[:4]
    assert tokens[4] == (a[4] + 1) % EOS
    assert len(tokens) == 8
    assert harness.tokens["b"] == b


@pytest.mark.parametrize("overlaps", [False, True])
def test_one_banned_token_costs_no_step(make_harness, overlaps):
    free = make_harness(overlaps=overlaps)
    free.add("a", [1, 2, 3], max_tokens=8)
    free.run()
    first = free.tokens["a"][0]
    harness = make_harness(overlaps=overlaps)
    harness.add("a", [1, 2, 3], max_tokens=8, banned=[[first]])
    harness.run()
    assert harness.tokens["a"][0] == (first + 1) % EOS
    assert first not in harness.tokens["a"]
    assert len(harness.runner.batches) == len(free.runner.batches)


def test_a_replayed_request_keeps_its_bans(make_harness):
    whole = make_harness(overlaps=True)
    first = make_harness(overlaps=True)
    first.add("a", [1, 2, 3], max_tokens=8)
    first.run()
    banned = [first.tokens["a"][2:5]]
    whole.add("a", [1, 2, 3], max_tokens=8, banned=banned)
    whole.run()
    replayed = make_harness(overlaps=True)
    resume = whole.tokens["a"][:4]
    replayed.add("a", [1, 2, 3], max_tokens=8, banned=banned, resume=resume)
    replayed.run()
    assert [*resume, *replayed.tokens["a"]] == whole.tokens["a"]
