"""The engine driven through arbitrary sequences of arrivals, aborts, deaths and steps."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headrace.engine.client import FinishReason
from headrace.sampling_params import BACKGROUND_PRIORITY

MAYBE_EARLY = st.none() | st.integers(0, 8)


@st.composite
def extras(draw):
    """What a request may ask for besides a number of tokens; most ask for nothing."""
    modulus = draw(st.sampled_from([0, 0, 0, 3, 6]))
    return {
        "stop_token_ids": tuple(range(1, 999, modulus)) if modulus else (),
        "min_tokens": draw(st.sampled_from([0, 0, 3])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
        "logprobs": draw(st.sampled_from([None, None, 0])),
        "prompt_logprobs": draw(st.sampled_from([None, None, None, 0])),
        "eos_at": draw(MAYBE_EARLY),
        "broken_at": draw(st.none() | MAYBE_EARLY),
        "deadline": draw(st.sampled_from([None] * 9 + [0.0])),
    }


def machine_for(make_harness, overlaps):
    class EngineMachine(RuleBasedStateMachine):
        """A pool so small that preemption, eviction and prefix hits happen all the time."""

        @initialize(
            num_blocks=st.integers(8, 14),
            block_size=st.sampled_from([1, 3, 4]),
            budget=st.integers(4, 24),
            prefix_caching=st.booleans(),
        )
        def start(self, num_blocks, block_size, budget, prefix_caching):
            self.room = num_blocks * block_size
            self.options = {
                "num_blocks": num_blocks,
                "block_size": block_size,
                "max_num_seqs": 4,
                "max_model_len": self.room,
                "budget": budget,
                "prefix_caching": prefix_caching,
                "overlaps": overlaps,
            }
            self.harness = make_harness(**self.options)
            self.requests = {}
            self.aborted = set()

        @rule(
            # Few distinct prompts, so that prefixes are shared and evicted.
            family=st.integers(0, 2),
            length=st.integers(1, 20),
            max_tokens=st.integers(3, 12),
            priority=st.integers(-1, 1) | st.just(BACKGROUND_PRIORITY),
            extras=st.just({}) | extras(),
        )
        def add(self, family, length, max_tokens, priority, extras):
            prompt = [family * 100 + index for index in range(min(length, self.room - 1))]
            fields = {"prompt": prompt, "max_tokens": max_tokens, "priority": priority, **extras}
            request_id = f"r{len(self.requests)}"
            self.requests[request_id] = fields
            self.harness.add(request_id, **fields)

        @precondition(lambda self: self.requests)
        @rule(data=st.data())
        def abort(self, data):
            request_id = data.draw(st.sampled_from(sorted(self.requests)))
            if request_id not in self.harness.ended:
                self.aborted.add(request_id)
            self.harness.abort(request_id)

        @rule(steps=st.integers(1, 5))
        def step(self, steps):
            for _ in range(steps):
                self.harness.step()

        @rule()
        def reset_prefix_cache(self):
            self.harness.kv_cache.reset_prefix_cache()

        @rule()
        def die(self):
            """The client starts another engine and replays what had not ended."""
            dead, self.harness = self.harness, make_harness(**self.options)
            self.harness.inherit(dead)
            for request_id, fields in self.requests.items():
                if request_id in dead.ended:
                    continue
                received = dead.tokens[request_id]
                if received:
                    fields = {**fields, "prompt_logprobs": None}
                self.harness.add(request_id, resume=received, **fields)

        @invariant()
        def nothing_leaks(self):
            self.harness.engine.check_invariants()
            assert self.harness.scheduler.num_running <= 4

        def teardown(self):
            if not hasattr(self, "harness"):
                return
            self.harness.run()
            assert self.harness.ended.keys() == self.requests.keys(), "a request never ended"
            assert self.harness.kv_cache.num_used_blocks == 0
            undisturbed = run_undisturbed(make_harness, self.room, self.requests)
            for request_id in self.requests:
                compare(self.harness, undisturbed, request_id, self.aborted)

    return EngineMachine


def run_undisturbed(make_harness, room, requests):
    """One step after another, with room for all, and nothing shared."""
    harness = make_harness(
        num_blocks=max(len(requests), 1) * room,
        block_size=1,
        max_num_seqs=max(len(requests), 1),
        max_model_len=room,
        budget=1 << 16,
        prefix_caching=False,
    )
    for request_id, fields in requests.items():
        harness.add(request_id, **fields)
    harness.run()
    return harness


def compare(actual, expected, request_id, aborted):
    """The same tokens and end; of an aborted request, the beginning of the same tokens."""
    end, expected_end = actual.ended[request_id], expected.ended[request_id]
    tokens, all_tokens = actual.tokens[request_id], expected.tokens[request_id]
    logprobs = actual.logprobs.get(request_id, [])
    all_logprobs = expected.logprobs.get(request_id, [])
    assert (end.finish_reason is FinishReason.ABORT) == (request_id in aborted)
    assert tokens == all_tokens[: len(tokens)]
    assert logprobs == all_logprobs[: len(logprobs)]
    assert len(logprobs) == min(len(tokens), len(all_logprobs))
    assert end.record.output_tokens == len(tokens)
    assert end.record.prompt_tokens == expected_end.record.prompt_tokens
    if tokens:
        prompt_logprobs = actual.prompt_logprobs.get(request_id)
        assert prompt_logprobs == expected.prompt_logprobs.get(request_id)
    if end.finish_reason is not FinishReason.ABORT:
        assert len(tokens) == len(all_tokens)
        assert end.finish_reason is expected_end.finish_reason
        assert end.stop_token_id == expected_end.stop_token_id
        assert end.error == expected_end.error


@pytest.mark.parametrize("overlaps", [False, True])
def test_any_sequence_of_events_gives_the_undisturbed_outputs(make_harness, overlaps):
    run_state_machine_as_test(
        machine_for(make_harness, overlaps),
        settings=settings(
            max_examples=70 if overlaps else 25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
