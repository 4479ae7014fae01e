"""Scheduler and cache driven through arbitrary sequences of arrivals, aborts and steps."""

from __future__ import annotations

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


def machine_for(make_harness, expected):
    class SchedulerMachine(RuleBasedStateMachine):
        """A pool so small that preemption, eviction and prefix hits happen all the time."""

        @initialize(
            num_blocks=st.integers(8, 14),
            block_size=st.sampled_from([1, 3, 4]),
            budget=st.integers(4, 24),
            prefix_caching=st.booleans(),
        )
        def start(self, num_blocks, block_size, budget, prefix_caching):
            self.harness = make_harness(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=4,
                max_model_len=num_blocks * block_size,
                budget=budget,
                prefix_caching=prefix_caching,
            )
            self.room = num_blocks * block_size
            self.requests = {}

        @rule(
            # Few distinct prompts, so that prefixes are shared and evicted.
            family=st.integers(0, 2),
            length=st.integers(1, 20),
            max_tokens=st.integers(1, 12),
            priority=st.integers(-1, 1),
        )
        def add(self, family, length, max_tokens, priority):
            prompt = [family * 100 + index for index in range(min(length, self.room - 1))]
            request_id = f"r{len(self.requests)}"
            self.requests[request_id] = (prompt, min(max_tokens, self.room - len(prompt)))
            self.harness.add(request_id, prompt, max_tokens=max_tokens, priority=priority)

        @precondition(lambda self: self.requests)
        @rule(data=st.data())
        def abort(self, data):
            self.harness.abort(data.draw(st.sampled_from(sorted(self.requests))))

        @rule(steps=st.integers(1, 5))
        def step(self, steps):
            for _ in range(steps):
                self.harness.step()

        @rule()
        def reset_prefix_cache(self):
            self.harness.kv_cache.reset_prefix_cache()

        @invariant()
        def nothing_leaks_and_outputs_are_right(self):
            harness = self.harness
            harness.scheduler.check_invariants()
            assert harness.scheduler.num_running <= 4
            for request_id, (prompt, max_tokens) in self.requests.items():
                tokens = harness.tokens[request_id]
                assert tokens == expected(prompt, len(tokens))
                ended = harness.ended.get(request_id)
                if ended and ended.finish_reason is FinishReason.LENGTH:
                    assert len(tokens) == max_tokens

        def teardown(self):
            if not hasattr(self, "harness"):
                return
            self.harness.run()
            assert self.harness.ended.keys() == self.requests.keys(), "a request never ended"
            assert self.harness.kv_cache.num_used_blocks == 0

    return SchedulerMachine


def test_any_sequence_of_events_keeps_the_invariants(make_harness, expected):
    run_state_machine_as_test(
        machine_for(make_harness, expected),
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
