"""The simulated fleet: its caches against the engine's, its times against sums, its policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from bench.cluster.replica import BlockCache, EngineShape, Job, Replica, StepTimes, block_keys
from bench.cluster.simulation import POLICIES, Cluster, Outcome
from bench.cluster.traffic import Workload, trace
from bench.cluster_sim import STEP_TIMES, figures, load_shape, simulate
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.block_pool import BlockPool
from headrace.errors import ConfigError
from headrace.route.choose import ReplicaLoad
from headrace.route.prefix import Prefix

TIMES = StepTimes(
    base=0.003,
    per_row=0.0005,
    per_context_token=4e-7,
    per_prompt_token=3.7e-4,
    per_prompt_pair=2e-8,
)
SHAPE = EngineShape(times=TIMES)
CLUSTER = Cluster(shape=SHAPE)


def job(tokens: int, output: int, stream: int = 1, arrival: float = 0.0) -> Job:
    return Job(((stream, tokens),), output, arrival, Prefix((stream,), (tokens,), stream, tokens))


def run_alone(replica: Replica, *jobs: Job) -> None:
    for one in jobs:
        replica.add(one, one.arrival)
    while replica.step_end is not None:
        replica.end_step(replica.step_end)


def test_a_request_alone_takes_the_sum_of_its_steps() -> None:
    alone = job(600, 3)
    replica = Replica(SHAPE, "a")
    run_alone(replica, alone)
    chunks = [(0, 256), (256, 256), (512, 88)]
    prefill = sum(
        TIMES.base + TIMES.prompt(tokens, tokens * (before + tokens / 2))
        for before, tokens in chunks
    )
    decode = 2 * (TIMES.base + TIMES.per_row) + TIMES.per_context_token * (600 + 601)
    assert alone.first_token == pytest.approx(prefill)
    assert alone.finished == pytest.approx(prefill + decode)
    assert (replica.prefill_tokens, replica.decode_tokens) == (600, 3)
    assert replica.busy_seconds == pytest.approx(alone.finished)
    again = job(600, 1, arrival=alone.finished)
    run_alone(replica, again)
    assert again.cached == 592  # the last token is always computed: 37 blocks of 16
    assert replica.cache.num_free == SHAPE.num_blocks


def test_too_few_blocks_preempt_and_all_is_done_in_the_end() -> None:
    replica = Replica(replace(SHAPE, num_blocks=40), "a")
    jobs = [job(200, 150, stream) for stream in range(1, 4)]
    run_alone(replica, *jobs)
    assert all(one.finished > one.first_token > 0 for one in jobs)
    assert replica.preemptions > 0
    assert (replica.cache.num_free, replica.num_live, replica.queued_tokens) == (40, 0, 0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(16, 400)), max_size=30))
def test_blocks_are_kept_as_the_engine_keeps_them(prompts: list[tuple[int, int]]) -> None:
    """One request after another: found, taken, registered and released as in engine/block_pool."""
    cache, pool = BlockCache(30), BlockPool(30)
    for stream, tokens in prompts:
        keys = block_keys([(9, 32), (stream, tokens)], 16)
        hashes = [key.to_bytes(8, "little") for key in keys]
        hits = cache.find(keys)
        held = []
        for one in hashes:
            if (block := pool.lookup(one)) is None:
                break
            held.append(block)
        assert hits == len(held)
        missing = -(-(32 + tokens) // 16) - hits
        cache.share(keys[:hits])
        pool.share(held)
        assert cache.num_free == pool.num_free
        cache.take(missing)
        held += pool.take(missing) or []
        fresh = cache.register(keys[hits:])
        for block, one in zip(held[hits:], hashes[hits:], strict=False):
            pool.register(block, one)
        cache.release(keys[:hits] + fresh)
        cache.take(len(fresh) - missing)
        pool.release(held)
        assert cache.num_free == pool.num_free == 30


def run(policy: str, workload: Workload, **cluster: int) -> Outcome:
    return simulate(replace(CLUSTER, policy=policy, **cluster), workload)


def told(outcome: Outcome) -> dict[str, float]:
    return figures(outcome, slo_ttft=1.0, slo_tpot=0.1)


def test_conversations_on_four_replicas() -> None:
    """The figures that routing by cache is for."""
    workload = Workload(requests=1200)
    blind, ours = (run(policy, workload) for policy in ("round-robin", "ours"))
    assert len(blind.jobs) == len(ours.jobs)
    for outcome in (blind, ours):
        computed = sum(replica.prefill_tokens for replica in outcome.replicas)
        cached = sum(one.cached for one in outcome.jobs)
        assert computed + cached == sum(one.prompt_tokens for one in outcome.jobs)
    assert told(blind)["prefill_tokens"] >= 2 * told(ours)["prefill_tokens"]
    assert told(ours)["busiest_prefill"] <= 1.3
    assert told(ours)["ttft_p50_ms"] < told(blind)["ttft_p50_ms"]


def test_doors_that_hear_of_each_other_come_close_to_one() -> None:
    workload = Workload(requests=600)
    one, four, blind = (
        told(run(policy, workload, doors=doors))["prefill_tokens"]
        for policy, doors in (("ours", 1), ("ours", 4), ("round-robin", 1))
    )
    assert four < 1.5 * one
    assert four < blind / 1.7


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_and_the_same_every_time(policy: str) -> None:
    first, second = (run(policy, Workload(requests=200, rate=8.0), doors=2) for _ in range(2))
    assert len({id(one) for one in first.jobs}) == len(first.jobs) > 150
    assert all(one.finished >= one.first_token > one.arrival for one in first.jobs)
    assert [one.finished for one in first.jobs] == [one.finished for one in second.jobs]


def test_a_scaler_starts_replicas_and_drains_them() -> None:
    asked: list[tuple[float, int]] = []

    def scaler(now: float, loads: Sequence[ReplicaLoad]) -> int:
        asked.append((now, len(loads)))
        return 3 if 20 <= now < 60 else 1

    cluster = replace(CLUSTER, replicas=1, start_delay_s=5.0)
    outcome = simulate(cluster, Workload(requests=500, rate=4.0), scaler=scaler)
    assert outcome.sizes[:3] == [(0.0, 1), (20.0, 2), (20.0, 3)]
    assert min(replica.requests for replica in outcome.replicas) > 0
    gone = [replica for replica in outcome.replicas if replica.draining]
    assert [replica.num_live for replica in gone] == [0, 0]
    assert outcome.sizes[-1][1] == 1
    assert outcome.replica_seconds < 3 * outcome.seconds
    assert max(count for _, count in asked) == 3


def test_no_replica_yet_holds_requests_back() -> None:
    cluster = replace(CLUSTER, replicas=0, start_delay_s=5.0)
    outcome = simulate(cluster, Workload(requests=50), scaler=lambda now, loads: 2)
    assert len(outcome.jobs) > 10
    assert min(one.first_token for one in outcome.jobs) > 5.0


def test_a_trace(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1300, "output_length": 10, "hash_ids": [1, 2, 3]},
        {"timestamp": 5000, "input_length": 1400, "output_length": 5, "hash_ids": [1, 2, 4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    outcome = simulate(CLUSTER, path)
    assert [one.cached for one in outcome.jobs] == [0, 1024]
    assert [one.arrival for one in outcome.jobs] == [0.0, 5.0]
    assert trace(path, 600)[0].prompt_tokens == 600
    path.write_text('{"timestamp": 0, "input_length": 1300, "output_length": 1, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match=r"trace.jsonl:1: 1 hash_ids for 1300 tokens"):
        trace(path, 4096)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="needs timestamp"):
        trace(path, 4096)


def test_the_saved_step_times_are_plausible() -> None:
    shape = load_shape(STEP_TIMES, 4096)
    assert 100 < shape.prefill_rate < 1e6
    assert shape.times.decode(1, 100) < shape.times.decode(16, 1600) < 16 * shape.times.decode(1, 0)
