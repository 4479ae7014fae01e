"""Ray Serve's autoscaling by what users were promised: `sizing.decide` as its policy.

A Serve config names it, in a deployment's options:

    autoscaling_config:
      min_replicas: 1
      max_replicas: 8
      upscale_delay_s: 0      # the policy has its own delays
      downscale_delay_s: 0
      policy:
        policy_function: headrace.deploy.autoscaling:SloPolicy
        policy_kwargs: {ttft_s: 1.0, tpot_s: 0.05}

Ray runs it in its controller, so Headrace must be installed on the head node, too.
"""

from __future__ import annotations

import difflib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from headrace.deploy.registry import open_registry
from headrace.deploy.sizing import Decision, Fleet, Memory, ReplicaStats, Targets, decide

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

logger = logging.getLogger("ray.serve")  # the one that has a file in the controller

POLICY = "headrace.deploy.autoscaling:SloPolicy"
PERIOD_S = 1.0
"""Between two decisions under Ray."""
READ_TIMEOUT_S = 5.0
RATE_S = 15.0
"""Over which rates are taken. Replicas note numbers every look_back_period_s / 5, or 6 s."""
STATE = "headrace"
"""Our key in the state that Ray keeps between two calls."""
GAUGES = (
    "running",
    "queued",
    "queued_tokens",
    "kv_used_blocks",
    "kv_total_blocks",
    "max_num_seqs",
    "prefill_tokens_per_s",
    "decode_step_s",
)
"""What `record_autoscaling_stats` reports, besides the counters `prompt_tokens` (computed
ones), `requests` and `output_tokens`."""


class Demand:
    """What waits at doors, read in the background: the policy must not wait for an answer."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        """`read`: application -> requests; it may take long and may raise."""
        self._read = read
        self._known: Mapping[str, int] = {}
        self._thread: threading.Thread | None = None

    def of(self, application: str) -> int:
        """As of about a second ago; 0 while nobody answers."""
        if self._thread is None:
            arguments = (weakref.ref(self), self._read)
            self._thread = threading.Thread(target=_follow, args=arguments, daemon=True)
            self._thread.start()
        return self._known.get(application, 0)

    def take(self, known: Mapping[str, int]) -> None:
        self._known = known


def _follow(demand: weakref.ref[Demand], read: Callable[[], Mapping[str, int]]) -> None:
    """Until nobody has `demand` any more: a deployment that changes gets a new policy."""
    complaint = ""
    while demand() is not None:
        known: Mapping[str, int] = {}
        try:
            known, complaint = read(), ""
        except Exception as error:  # Ray has many, and none may end the reading
            if str(error) != complaint:
                complaint = str(error)
                logger.info("Nobody tells what waits at doors: %s", complaint)
        if (one := demand()) is not None:
            one.take(known)
        del one
        time.sleep(PERIOD_S)


def read_registry() -> dict[str, int]:
    """Application -> requests that wait at all doors. Raises what Ray raises.

    Starts the registry if there is none: where no replica runs, nobody else has.
    """
    import ray

    if not ray.is_initialized():  # asking would start a cluster
        return {}
    told: Any = ray.get(open_registry().demand.remote(), timeout=READ_TIMEOUT_S)
    return dict(told)


def report(load: Mapping[str, Any], totals: tuple[int, int]) -> dict[str, float]:
    """What a replica's `record_autoscaling_stats` returns.

    load: as `GET /load` answers it. totals: requests accepted and tokens generated since the start.
    """
    requests, output_tokens = totals
    return {
        **{name: float(load[name]) for name in GAUGES},
        "prompt_tokens": float(load["prefix_query_tokens"] - load["prefix_hit_tokens"]),
        "requests": float(requests),
        "output_tokens": float(output_tokens),
    }


def problems(autoscaling_config: Mapping[str, Any]) -> list[str]:
    """What is wrong with an `autoscaling_config` that names SloPolicy, to tell before it is sent:
    Ray finds out in its controller. Each entry names the key and the remedy. Another policy's is
    Ray's own concern."""
    policy = autoscaling_config.get("policy")
    if not isinstance(policy, Mapping) or policy.get("policy_function") != POLICY:
        return []
    found = []
    try:
        Targets.model_validate(policy.get("policy_kwargs") or {})
    except ValidationError as error:
        for one in error.errors():
            name = ".".join(str(part) for part in one["loc"])
            near = difflib.get_close_matches(name, Targets.model_fields, n=1)
            unknown = one["type"] == "extra_forbidden"
            what = f"unknown; did you mean {near[0]}?" if unknown and near else one["msg"]
            found.append(f"policy.policy_kwargs.{name}".removesuffix(".") + f": {what}")
    return found


class SloPolicy:
    """`decide` as an autoscaling policy of Ray Serve; one instance per deployment."""

    def __init__(self, **policy_kwargs: Any) -> None:
        """Raises pydantic.ValidationError, which names the argument, unless they are Targets."""
        self.targets = Targets(**policy_kwargs)
        self._demand = Demand(read_registry)
        self._last: tuple[float, int] | None = None
        self._told = ""

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """(replicas to have, what to hand to the next call).

        Ray asks ten times a second and reports come every few seconds, so an answer is good for
        PERIOD_S. While Ray has no numbers at all, nothing changes.
        """
        now = ctx.current_time or time.time()
        state = dict(ctx.policy_state)
        if STATE not in state:
            self._warn_of_delays(ctx)
        memory, decided, replicas = state.get(STATE, (Memory(), -math.inf, 0))
        if 0 <= now - decided < PERIOD_S:
            return replicas, state
        fleet = Fleet(
            ready=ctx.current_num_replicas,
            target=ctx.target_num_replicas,
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
            waiting=self._waiting(ctx),
        )
        decision = decide(stats_of(ctx.raw_metrics or {}, now), fleet, self.targets, memory, now)
        self._tell(ctx, decision)
        state[STATE] = (decision.memory, now, decision.replicas)
        return decision.replicas, state

    def _waiting(self, ctx: AutoscalingContext) -> int:
        """Requests that Serve's handles or doors hold because there is no replica."""
        held = 0 if ctx.current_num_replicas else math.ceil(ctx.total_num_requests)
        if ctx.capacity_adjusted_min_replicas or not ctx.app_name:
            return held  # it never sleeps
        return max(held, self._demand.of(ctx.app_name))

    def _warn_of_delays(self, ctx: AutoscalingContext) -> None:
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if delay := getattr(ctx.config, name):
                logger.warning(
                    "%s: autoscaling_config.%s: %g adds to the policy's own delays; set it to 0.",
                    ctx.app_name or ctx.deployment_name,
                    name,
                    delay,
                )

    def _tell(self, ctx: AutoscalingContext, decision: Decision) -> None:
        target = ctx.target_num_replicas
        if decision.replicas == target:
            self._told = ""
            return
        told = f"{target} -> {decision.replicas} replicas ({decision.reason})"
        if told != self._told:
            logger.info(
                "%s: %s; %.2f required, predicted TTFT %.2f s, TPOT %.0f ms",
                ctx.app_name or ctx.deployment_name,
                told,
                decision.required,
                decision.ttft_s,
                decision.tpot_s * 1e3,
            )
        self._told = told


def stats_of(
    raw_metrics: Mapping[str, Mapping[Any, Sequence[Any]]], now: float
) -> list[ReplicaStats]:
    """Of every replica that has reported, from what Ray keeps of its `record_autoscaling_stats`:
    name -> replica -> values with timestamps, oldest first."""
    series: dict[Any, dict[str, Sequence[Any]]] = {}
    for name, replicas in raw_metrics.items():
        for replica, points in replicas.items():
            if points:
                series.setdefault(replica, {})[name] = points
    return [_stats_of_one(one, now) for one in series.values() if "running" in one]


def _stats_of_one(series: Mapping[str, Sequence[Any]], now: float) -> ReplicaStats:
    last = {name: points[-1].value for name, points in series.items()}
    return ReplicaStats(
        age_s=max(0.0, now - series["running"][-1].timestamp),
        arriving_tokens_per_s=_rate(series, "prompt_tokens", "queued_tokens"),
        arriving_requests_per_s=_rate(series, "requests"),
        generated_tokens_per_s=_rate(series, "output_tokens"),
        **{name: float(last.get(name, 0.0)) for name in GAUGES},
    )


def _rate(series: Mapping[str, Sequence[Any]], *names: str) -> float:
    """Of the sum of these per second, over the last RATE_S; 0 after a restart, or without two
    points."""
    increase = seconds = 0.0
    for name in names:
        points = series.get(name, ())
        first = next(
            (one for one in points if points[-1].timestamp - one.timestamp <= RATE_S), None
        )
        if first is None:
            return 0.0
        increase += points[-1].value - first.value
        seconds = points[-1].timestamp - first.timestamp
    return max(0.0, increase / seconds) if seconds > 0 else 0.0
