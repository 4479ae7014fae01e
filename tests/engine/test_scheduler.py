"""Continuous batching, chunked prefill, preemption and ends, over the pretend model."""

from __future__ import annotations

import dataclasses
import time

import pytest

from headrace.engine.block_pool import BlockPool
from headrace.engine.client import FinishReason
from headrace.sampling_params import BACKGROUND_PRIORITY


def test_one_request_runs_to_its_length(make_harness, expected):
    harness = make_harness()
    harness.add("a", [1, 2, 3], max_tokens=5)
    harness.run()
    assert harness.tokens["a"] == expected([1, 2, 3], 5)
    record = harness.ended["a"].record
    assert record.finish_reason is FinishReason.LENGTH
    assert (record.prompt_tokens, record.output_tokens, record.preemptions) == (3, 5, 0)


def test_long_prompts_are_computed_in_chunks_while_others_decode(make_harness, expected):
    harness = make_harness(budget=8, max_model_len=128)
    harness.add("short", [7], max_tokens=20)
    harness.step()
    long_prompt = list(range(30))
    harness.add("long", long_prompt, max_tokens=3)
    for _ in range(4):
        batch, _ = harness.step()
        assert batch.num_tokens <= 8
        assert len(batch) == 2, "the decode goes on beside the prompt's chunks"
    harness.run()
    assert harness.tokens["short"] == expected([7], 20)
    assert harness.tokens["long"] == expected(long_prompt, 3)


def test_equal_prefixes_are_computed_once(make_harness, expected):
    harness = make_harness()
    prompt = list(range(13))
    harness.add("first", prompt, max_tokens=2)
    harness.run()
    harness.add("second", prompt, max_tokens=2)
    batch, _ = harness.step()
    assert batch.num_tokens == 1, "12 of 13 tokens are cached; the last is always computed"
    harness.run()
    assert harness.tokens["second"] == expected(prompt, 2)
    assert harness.ended["second"].record.cached_tokens == 12
    assert harness.kv_cache.hit_tokens == 12


def test_a_fully_cached_prompt_still_computes_its_last_block(make_harness):
    harness = make_harness()
    harness.add("first", list(range(8)), max_tokens=1)
    harness.run()
    harness.add("second", list(range(8)), max_tokens=1)
    batch, _ = harness.step()
    assert batch.num_tokens == 4


@pytest.mark.parametrize("difference", [{"salt": "other"}, {"prompt_logprobs": 0}])
def test_salt_and_prompt_logprobs_do_not_hit(make_harness, difference):
    harness = make_harness()
    harness.add("first", list(range(13)), max_tokens=1)
    harness.run()
    harness.add("second", list(range(13)), max_tokens=1, **difference)
    batch, _ = harness.step()
    assert batch.num_tokens == 13


def test_no_free_block_preempts_the_last_in_order_and_loses_nothing(make_harness, expected):
    harness = make_harness(num_blocks=8, max_model_len=32, max_num_seqs=4, budget=32)
    prompts = {name: [index] * 6 for index, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=18)
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    for name, prompt in prompts.items():
        assert harness.tokens[name] == expected(prompt, 18)
    assert harness.ended["a"].record.preemptions == 0, "the first in order is never the victim"


def test_priority_decides_who_starts_and_who_is_preempted(make_harness):
    harness = make_harness(max_num_seqs=1)
    harness.add("late", [1], max_tokens=2, priority=5)
    harness.add("soon", [2], max_tokens=2, priority=-5)
    harness.run()
    assert list(harness.ended) == ["soon", "late"]


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_background_gets_no_tokens_beside_others(make_harness, expected, overlaps):
    harness = make_harness(overlaps=overlaps)
    harness.add("batch", [1, 2], max_tokens=12, priority=BACKGROUND_PRIORITY)
    for _ in range(4):
        harness.step()
    harness.add("online", [3, 4], max_tokens=5, priority=BACKGROUND_PRIORITY - 1)
    harness.add("later batch", [5], max_tokens=2, priority=BACKGROUND_PRIORITY)
    batch, _ = harness.step()
    seen = [len(batch.rows)]
    while "online" not in harness.ended:
        batch, _ = harness.step()
        seen.append(batch and len(batch.rows))
    # The step after the one that ends it is launched before that is known.
    assert set(seen[: len(seen) - overlaps]) == {1}
    harness.run()
    assert harness.ended["batch"].record.preemptions == 0
    assert harness.tokens["batch"] == expected([1, 2], 12)
    assert harness.tokens["online"] == expected([3, 4], 5)
    assert harness.tokens["later batch"] == expected([5], 2)


@pytest.mark.parametrize("scarce", [{"max_num_seqs": 2}, {"num_blocks": 8}])
def test_the_background_gives_way_to_who_waits(make_harness, expected, scarce):
    options = {"num_blocks": 64, "max_model_len": 32, "max_num_seqs": 4, "budget": 32, **scarce}
    harness = make_harness(**options)
    prompts = {name: [index] * 12 for index, name in enumerate("ab")}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=16, priority=BACKGROUND_PRIORITY)
    for _ in range(3):
        harness.step()
    harness.add("online", [7] * 12, max_tokens=4)
    harness.run()
    assert list(harness.ended)[0] == "online"
    assert harness.ended["online"].record.preemptions == 0
    assert harness.ended["a"].record.preemptions == 0, "the first in order keeps its row"
    assert harness.ended["b"].record.preemptions > 0
    assert harness.tokens["online"] == expected([7] * 12, 4)
    for name, prompt in prompts.items():
        assert harness.tokens[name] == expected(prompt, 16)


def test_abort_frees_blocks_at_once_running_or_waiting(make_harness):
    harness = make_harness(max_num_seqs=1)
    harness.add("running", [1, 2, 3], max_tokens=50)
    harness.add("waiting", [4, 5, 6], max_tokens=50)
    harness.step()
    assert harness.kv_cache.num_used_blocks > 0
    harness.abort("running")
    harness.abort("waiting")
    assert harness.kv_cache.num_used_blocks == 0
    assert not harness.scheduler.has_work
    assert harness.ended["running"].record.finish_reason is FinishReason.ABORT
    assert harness.scheduler.abort("running") is None, "a second abort is harmless"
    harness.scheduler.check_invariants()


def test_eos_stop_tokens_and_ignore_eos(make_harness, expected):
    stop = expected([1, 2, 3], 4)[3]
    harness = make_harness()
    harness.add("stops", [1, 2, 3], max_tokens=10, stop_token_ids=(stop,))
    harness.run()
    ended = harness.ended["stops"]
    assert (ended.finish_reason, ended.stop_token_id) == (FinishReason.STOP, stop)
    assert harness.tokens["stops"][-1] == stop


def test_a_deadline_drops_what_still_waits(make_harness):
    harness = make_harness(max_num_seqs=1)
    harness.add("runs", [1], max_tokens=3)
    harness.step()
    harness.add("expires", [1], max_tokens=3)
    request = harness.scheduler._requests["expires"]
    request.source = dataclasses.replace(request.source, deadline=time.monotonic() - 1)
    harness.run()
    assert harness.ended["expires"].finish_reason is FinishReason.DEADLINE
    assert harness.tokens["expires"] == []


def test_broken_logits_fail_only_their_own_request(make_harness, expected):
    harness = make_harness()
    harness.add("good", [1], max_tokens=4)
    harness.add("bad", [2], max_tokens=4, broken_at=1)
    harness.run()
    assert harness.ended["bad"].finish_reason is FinishReason.ERROR
    assert "not numbers" in harness.ended["bad"].error
    assert len(harness.tokens["bad"]) == 1
    assert harness.tokens["good"] == expected([1], 4)


def test_a_replayed_request_goes_on_where_it_was(make_harness, expected):
    harness = make_harness()
    all_tokens = expected([1, 2, 3], 6)
    harness.add("replayed", [1, 2, 3], max_tokens=6, resume=all_tokens[:4])
    harness.run()
    assert harness.tokens["replayed"] == all_tokens[4:]
    assert harness.ended["replayed"].record.output_tokens == 6


def test_reset_forgets_cached_prefixes(make_harness):
    harness = make_harness()
    harness.add("first", list(range(13)), max_tokens=1)
    harness.run()
    harness.kv_cache.reset_prefix_cache()
    harness.add("second", list(range(13)), max_tokens=1)
    batch, _ = harness.step()
    assert batch.num_tokens == 13


def test_a_reset_has_written_blocks_taken_first():
    pool = BlockPool(8)
    blocks = pool.take(3)
    pool.register(blocks[0], b"first")
    pool.register(blocks[1], b"second")
    pool.release(blocks)
    pool.forget_all()
    pool.check_invariants()
    assert set(pool.take(3)) == set(blocks)
