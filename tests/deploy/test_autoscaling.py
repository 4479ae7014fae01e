"""The autoscaling policy as Ray Serve calls it: its name, what it is given, what it answers."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from headrace.deploy import autoscaling
from headrace.deploy.autoscaling import (
    GAUGES,
    PERIOD_S,
    POLICY,
    Demand,
    SloPolicy,
    problems,
    report,
    stats_of,
)

CONFIG = {
    "min_replicas": 0,
    "max_replicas": 8,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "policy": {"policy_function": POLICY, "policy_kwargs": {"ttft_s": 1.0, "tpot_s": 0.05}},
}
NOW = 1_000_000.0
BUSY = {"running": 20, "queued": 30, "queued_tokens": 9000, "prefill_tokens_per_s": 1000}


def reported(*replicas: dict[str, float], age: float = 0.0) -> dict[str, dict[str, list[Any]]]:
    """What Ray keeps of reports: name -> replica -> values, five of them, 6 s apart. A counter's
    value here is its rate."""
    counters = {"prompt_tokens", "requests", "output_tokens"}
    raw: dict[str, dict[str, list[Any]]] = {}
    for index, replica in enumerate(replicas):
        for name, value in replica.items():
            raw.setdefault(name, {})[f"replica {index}"] = [
                SimpleNamespace(
                    timestamp=NOW - age - 6 * back,
                    value=value * (1000 - 6 * back) if name in counters else value,
                )
                for back in (4, 3, 2, 1, 0)
            ]
    return raw


def context(raw: dict[str, dict[str, list[Any]]], target: int, **changes: Any) -> Any:
    """The members of Ray's AutoscalingContext that the policy reads."""
    members = {
        "app_name": "app",
        "deployment_name": "headrace",
        "current_num_replicas": target,
        "target_num_replicas": target,
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 8,
        "total_num_requests": 0.0,
        "raw_metrics": raw,
        "policy_state": {},
        "current_time": NOW,
        "config": SimpleNamespace(upscale_delay_s=0, downscale_delay_s=0),
    }
    return SimpleNamespace(**members | changes)


def test_stats_are_the_last_values_and_the_rates_of_counters() -> None:
    load = {
        "running": 3,
        "queued_tokens": 50,
        "prompt_tokens": 120,
        "requests": 2,
        "output_tokens": 9,
    }
    (one,) = stats_of(reported(load, age=4.0), NOW)
    assert (one.age_s, one.running, one.queued_tokens) == (4.0, 3, 50)
    rates = (one.arriving_tokens_per_s, one.arriving_requests_per_s, one.generated_tokens_per_s)
    assert rates == pytest.approx((120, 2, 9))


def test_a_replica_reports_what_the_policy_reads() -> None:
    load = dict.fromkeys(GAUGES, 7) | {"prefix_query_tokens": 900, "prefix_hit_tokens": 300}
    told = report(load, (5, 80))
    assert told == dict.fromkeys(GAUGES, 7.0) | {
        "prompt_tokens": 600,
        "requests": 5,
        "output_tokens": 80,
    }
    (one,) = stats_of(reported(told), NOW)
    assert (one.running, one.max_num_seqs, one.arriving_tokens_per_s) == (7, 7, 600 + 0)


def test_a_queue_that_grows_counts_as_arriving_and_a_restarted_engine_has_no_rate() -> None:
    raw = reported({"running": 1, "queued_tokens": 0, "prompt_tokens": 100, "output_tokens": 1})
    for index, point in enumerate(raw["queued_tokens"]["replica 0"]):
        point.value = 600 * index
    raw["output_tokens"]["replica 0"][-1].value = 0
    (one,) = stats_of(raw, NOW)
    assert one.arriving_tokens_per_s == pytest.approx(100 + 100)
    assert one.generated_tokens_per_s == 0


def test_replicas_without_our_numbers_have_not_reported() -> None:
    assert stats_of({}, NOW) == []
    assert stats_of({"ongoing": {"replica": [SimpleNamespace(timestamp=NOW, value=1)]}}, NOW) == []


def test_it_answers_with_a_number_and_keeps_its_memory_in_rays_state() -> None:
    policy = SloPolicy(ttft_s=1.0)
    loads = reported({**BUSY, "prompt_tokens": 2000, "requests": 5})
    more, state = policy(context(loads, 1))
    assert more > 1
    # Ray asks ten times a second.
    quiet = reported({"running": 0})
    assert policy(context(quiet, 1, policy_state=state, current_time=NOW + PERIOD_S / 2)) == (
        more,
        state,
    )
    later, _ = policy(context(quiet, more, policy_state=state, current_time=NOW + PERIOD_S))
    assert later >= more, "it shrinks after its delay"


def test_requests_that_serves_handles_hold_wake_it() -> None:
    asleep = context({}, 0, total_num_requests=3.0)
    assert SloPolicy()(asleep)[0] == 1
    assert SloPolicy()(context({}, 0))[0] == 0


def test_requests_that_wait_at_doors_wake_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling, "PERIOD_S", 0.01)
    monkeypatch.setattr(autoscaling, "read_registry", lambda: {"app": 2})
    policy, decided = SloPolicy(), 0
    deadline = time.monotonic() + 10
    while not decided and time.monotonic() < deadline:
        decided, _ = policy(context({}, 0))
        time.sleep(0.01)
    assert decided == 1
    other = context({}, 0, app_name="other")
    assert policy(other)[0] == 0


def test_reading_demand_survives_errors_and_ends_with_its_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autoscaling, "PERIOD_S", 0.01)
    answers = iter([{"app": 1}, OSError("away"), {"app": 3}])

    def read() -> dict[str, int]:
        answer = next(answers, {"app": 3})
        if isinstance(answer, OSError):
            raise answer
        return answer

    demand = Demand(read)
    seen = set()
    deadline = time.monotonic() + 10
    while 3 not in seen and time.monotonic() < deadline:
        seen.add(demand.of("app"))
    assert 3 in seen
    thread = demand._thread
    assert thread is not None
    del demand
    thread.join(10)
    assert not thread.is_alive()


def test_a_typo_in_policy_kwargs_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="tttf_s"):
        SloPolicy(tttf_s=1.0)
    assert problems(CONFIG) == []
    wrong = {**CONFIG, "policy": {"policy_function": POLICY, "policy_kwargs": {"tttf_s": 1.0}}}
    assert problems(wrong) == ["policy.policy_kwargs.tttf_s: unknown; did you mean ttft_s?"]
    wrong["policy"] = {"policy_function": POLICY, "policy_kwargs": {"tpot_s": -1}}
    (problem,) = problems(wrong)
    assert problem.startswith("policy.policy_kwargs.tpot_s: ")
    assert "greater than 0" in problem
    del wrong["policy"]
    assert problems(wrong) == [], "Ray's own policy"


def test_rays_own_delays_are_told(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").addHandler(caplog.handler)  # Serve's does not propagate
    try:
        slow = context({}, 1, config=SimpleNamespace(upscale_delay_s=30.0, downscale_delay_s=0))
        policy = SloPolicy()
        _, state = policy(slow)
        policy(context({}, 1, policy_state=state, config=slow.config))
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if "delay" in record.getMessage()]
    assert set(told) == {
        "app: autoscaling_config.upscale_delay_s: 30 adds to the policy's own delays; set it to 0."
    }


def test_a_serve_file_with_a_typo_in_the_policy_is_refused_before_it_is_sent() -> None:
    from headrace.deploy.serve_file import check

    policy = {"policy_function": POLICY, "policy_kwargs": {"tttf_s": 1.0}}
    deployment = {"name": "headrace", "autoscaling_config": {**CONFIG, "policy": policy}}
    application = {
        "name": "chat",
        "import_path": "headrace.deploy.ray_serve:build_app",
        "deployments": [deployment],
    }
    found, _ = check({"applications": [application]})
    assert found == [
        "applications[0].deployments[0].autoscaling_config.policy.policy_kwargs.tttf_s: "
        "unknown; did you mean ttft_s?"
    ]


def test_ray_takes_it_by_name_and_calls_it() -> None:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    config = AutoscalingConfig(**CONFIG)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)  # sent to the controller
    ctx = AutoscalingContext(
        deployment_id="id",
        deployment_name="headrace",
        app_name="app",
        current_num_replicas=1,
        target_num_replicas=1,
        running_replicas=["replica 0"],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: reported({**BUSY, "prompt_tokens": 2000, "requests": 5}),
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW,
        config=config,
    )
    replicas, state = policy(ctx)
    assert 1 < replicas <= 8
    assert set(state) == {"headrace"}
