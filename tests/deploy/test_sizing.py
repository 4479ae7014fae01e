"""How many replicas: the policy as a function of numbers, and against traces in virtual time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from bench.autoscaling import TRACES, Model, Ongoing, Ours, Speed, Trace, attainment, play
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.deploy.sizing import Decision, Fleet, Memory, ReplicaStats, Targets, decide

TARGETS = Targets(ttft_s=2.0, tpot_s=0.1)
BUSY = ReplicaStats(
    running=20,
    queued=0,
    kv_used_blocks=400,
    kv_total_blocks=1200,
    max_num_seqs=32,
    prefill_tokens_per_s=1500,
    decode_step_s=0.05,
    arriving_tokens_per_s=600,
    arriving_requests_per_s=3,
    generated_tokens_per_s=240,
)
IDLE = ReplicaStats(kv_total_blocks=1200, max_num_seqs=32)


class Run:
    """A fleet that follows the policy at once, second by second."""

    def __init__(
        self, size: int, targets: Targets = TARGETS, low: int = 1, high: int = 100
    ) -> None:
        self.fleet = Fleet(ready=size, target=size, min_replicas=low, max_replicas=high)
        self.targets, self.memory, self.now = targets, Memory(), 1e6

    def step(
        self, *stats: ReplicaStats, seconds: int = 1, ready: int | None = None, waiting: int = 0
    ) -> Decision:
        for _ in range(seconds):
            self.fleet = replace(
                self.fleet,
                ready=self.fleet.target if ready is None else ready,
                waiting=waiting,
            )
            decision = decide(stats, self.fleet, self.targets, self.memory, self.now)
            self.memory = decision.memory
            self.fleet = replace(self.fleet, target=decision.replicas)
            self.now += 1
        return decision

    @property
    def size(self) -> int:
        return self.fleet.target


def test_a_small_fleet_grows_at_once_and_says_why() -> None:
    decision = Run(1).step(replace(BUSY, arriving_tokens_per_s=3000, queued_tokens=9000, queued=40))
    assert decision.replicas > 1
    assert decision.reason in {"TTFT", "TPOT", "queue"}
    assert decision.ttft_s == pytest.approx((9000 + 200) / 1500, rel=0.2)


def test_it_shrinks_after_the_delay_and_only_to_what_was_needed_meanwhile() -> None:
    run = Run(10)
    run.step(*[BUSY] * 4, *[IDLE] * 6, seconds=280)
    assert run.size == 10
    run.step(*[BUSY] * 4, *[IDLE] * 6, seconds=20)
    needed = run.size
    assert 4 <= run.step(*[BUSY] * 4, *[IDLE] * 6, seconds=30).replicas < 10
    run.step(*[IDLE] * 10, seconds=200)
    assert run.size >= min(needed, 4), "the load was there within the delay"
    run.step(*[IDLE] * 10, seconds=150)
    assert run.size == 1


def test_replicas_that_are_ordered_are_not_ordered_again() -> None:
    run = Run(2)
    overload = replace(BUSY, arriving_tokens_per_s=2400, queued=30, queued_tokens=6000)
    run.step(overload, overload, seconds=30, ready=2)
    first = run.size
    assert first > 2
    run.step(overload, overload, seconds=300, ready=2)
    assert run.size <= first + 1


def shared(size: int, prompts: float, tokens: float, step_s: float = 0.02) -> list[ReplicaStats]:
    """What `size` replicas report of a load, evenly spread: `prompts` and `tokens` are tokens per
    second to prefill and to generate. A step takes step_s and 2 ms for each request."""
    prefill, decode = prompts / size / 1500, tokens / size
    tpot = step_s / max(0.05, 1 - prefill - 0.002 * decode)
    running = decode * tpot
    # Batches differ by chance, or nobody could tell what one more request costs.
    return [
        replace(
            BUSY,
            running=running * factor,
            decode_step_s=step_s + 0.002 * running * factor,
            kv_used_blocks=15 * running,
            arriving_tokens_per_s=prompts / size,
            arriving_requests_per_s=prompts / size / 200,
            generated_tokens_per_s=decode,
        )
        for factor in [0.7, 1.3, 1.0] * size
    ][:size]


@pytest.mark.parametrize("start", [1, 3, 5, 12])
@pytest.mark.parametrize("prompts", [300, 1300, 1500, 2900])
def test_a_steady_load_has_one_size_and_no_oscillation(prompts: float, start: int) -> None:
    run = Run(start)
    for _ in range(500):
        run.step(*shared(run.size, prompts, prompts / 4))
    sizes = [run.step(*shared(run.size, prompts, prompts / 4)).replicas for _ in range(700)]
    assert len(set(sizes)) == 1
    least = math.ceil(prompts / 1500 + 0.002 * prompts / 4)
    assert least <= sizes[0] <= 2 * least


@pytest.mark.parametrize("missing", ["one", "stale", "all"])
def test_missing_and_stale_numbers_do_not_shrink_it(missing: str) -> None:
    run = Run(4)
    stale = replace(IDLE, age_s=TARGETS.stale_s + 1)
    stats = {"one": [IDLE] * 3, "stale": [IDLE, IDLE, IDLE, stale], "all": []}[missing]
    run.step(*stats, seconds=1000)
    assert run.size == 4
    run.step(*[IDLE] * 4, seconds=int(TARGETS.downscale_delay_s))
    assert run.size == 4, "the time without numbers counts as a time of need"
    run.step(*[IDLE] * 4, seconds=10)
    assert run.size == 1


def test_numbers_that_are_there_grow_it_although_others_are_missing() -> None:
    overload = replace(BUSY, arriving_tokens_per_s=3000)
    assert Run(4).step(overload, overload).replicas > 4


def test_zero_is_reached_only_when_idle_and_allowed() -> None:
    run, never = Run(2, low=0), Run(2)
    for one in (run, never):
        one.step(IDLE, replace(IDLE, running=1), seconds=1000)
        one.step(replace(IDLE, arriving_requests_per_s=0.01), seconds=1000)
        assert one.size == 1, "a request now and then keeps one"
        one.step(IDLE, seconds=int(TARGETS.idle_s) - 5)
        assert one.size == 1
        one.step(IDLE, seconds=10)
    assert (run.size, never.size) == (0, 1)


def test_requests_that_wait_in_front_wake_it() -> None:
    run = Run(0, low=0)
    assert run.step(seconds=100).replicas == 0
    assert run.step(waiting=1).replicas == 1
    assert run.step(waiting=50, ready=0, seconds=60).replicas == 1
    # They went out, and the replica is loaded before it reports for the first time.
    assert run.step(seconds=60, ready=0).replicas == 1


def test_full_sequences_and_full_kv_cache_count_those_that_wait() -> None:
    slots = replace(BUSY, running=32, queued=32, arriving_tokens_per_s=1, decode_step_s=0.02)
    blocks = replace(slots, max_num_seqs=0, kv_used_blocks=1190)
    for full, reason in ((slots, "sequences"), (blocks, "KV cache")):
        decision = Run(1).step(full)
        assert (decision.reason, decision.replicas) == (reason, 3)
    roomy = replace(slots, running=10, kv_used_blocks=100)
    assert Run(1).step(roomy).replicas == 1, "they wait for their prefill, which is fast"


def test_a_tpot_that_no_fleet_can_have_does_not_order_an_endless_one() -> None:
    run = Run(2, Targets(tpot_s=0.001))
    for _ in range(1000):
        run.step(*shared(run.size, 900, 300))
    assert 2 <= run.size <= 6


@settings(max_examples=50)
@given(
    stats=st.lists(
        st.builds(
            ReplicaStats,
            **{
                name: st.floats(0, 1e6, allow_nan=False)
                for name in ReplicaStats.__dataclass_fields__
            },
        ),
        max_size=4,
    ),
    sizes=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    seconds=st.lists(st.floats(0, 1000), min_size=1, max_size=3),
)
def test_any_numbers_give_a_number_within_the_bounds(
    stats: list[ReplicaStats], sizes: list[int], seconds: list[float]
) -> None:
    ready, target, low, more = sizes
    fleet = Fleet(ready=ready, target=target, min_replicas=low, max_replicas=low + more)
    memory, now = Memory(), 0.0
    for elapsed in seconds:
        now += elapsed
        decision = decide(stats, fleet, TARGETS, memory, now)
        memory = decision.memory
        assert low <= decision.replicas <= low + more
        assert math.isfinite(decision.required)
        if any(one.age_s > TARGETS.stale_s for one in stats) and len(stats) <= ready:
            assert decision.replicas >= min(target, low + more)


# ---- traces -------------------------------------------------------------------------------------


def _outcome(trace: Trace, policy: Ours | Ongoing) -> tuple[Model, float, float]:
    model, requests = play(trace, policy, Speed())
    return model, attainment(requests, TARGETS), model.replica_seconds / 3600


def test_random_arrivals_of_a_steady_load_hardly_move_it() -> None:
    model, attained, _ = _outcome(TRACES["steady"], Ours(TARGETS))
    assert attained > 0.98
    assert len(model.sizes) - 1 <= 3


@pytest.mark.parametrize(
    ("name", "floor"), [("step", 0.95), pytest.param("ramp", 0.975, marks=pytest.mark.slow)]
)
def test_it_keeps_the_promise_better_than_a_count_of_requests_with_as_many_replicas(
    name: str, floor: float
) -> None:
    _, ours, hours = _outcome(TRACES[name], Ours(TARGETS))
    _, theirs, their_hours = _outcome(TRACES[name], Ongoing(8))
    assert ours > max(floor, theirs)
    fixed = TRACES[name]
    still, requests = play(replace(fixed, start=6), lambda model: model.target, Speed())
    assert attainment(requests, TARGETS) - ours < 0.05
    assert hours < 0.8 * still.replica_seconds / 3600
    assert hours < 1.2 * their_hours


def test_a_step_is_answered_within_seconds_of_its_first_reports() -> None:
    policy = Ours(TARGETS)
    play(replace(TRACES["step"], seconds=600), policy, Speed())
    ups = [time for time, _, size in policy.decisions if size > 2]
    assert 300 < ups[0] < 330


@pytest.mark.slow
def test_slow_starts_do_not_make_it_order_many_times_what_it_needs() -> None:
    model, _, _ = _outcome(TRACES["step"], Ours(TARGETS))
    targets = TARGETS.model_copy(update={"startup_s": 120.0})
    slow, _ = play(TRACES["step"], Ours(targets), Speed(startup_s=120.0))
    assert max(size[2] for size in slow.sizes) <= 3 * max(size[2] for size in model.sizes)


def test_half_of_the_fleet_dies() -> None:
    model, attained, _ = _outcome(TRACES["outage"], Ours(TARGETS))
    assert attained > 0.97
    assert all(size[2] >= 3 for size in model.sizes)


@pytest.mark.slow
def test_lost_reports_change_nothing() -> None:
    policy = Ours(TARGETS)

    def deaf(model: Model) -> int:
        model.deaf = model.now > 900
        return policy(model)

    model, _ = play(TRACES["step"], deaf, Speed())
    at_loss = [size[2] for size in model.sizes if size[0] <= 930][-1]
    assert all(size[2] >= at_loss for size in model.sizes if size[0] > 930)


@pytest.mark.slow
def test_a_day_with_bursts() -> None:
    _, ours, hours = _outcome(TRACES["day"], Ours(TARGETS))
    assert ours > 0.97
    for ongoing in (8, 16):
        _, theirs, their_hours = _outcome(TRACES["day"], Ongoing(ongoing))
        assert ours > theirs
        assert hours < their_hours
    peak = replace(TRACES["day"], start=8)
    fixed, requests = play(peak, lambda model: model.target, Speed())
    assert attainment(requests, TARGETS) - ours < 0.03
    assert hours < 0.5 * fixed.replica_seconds / 3600
