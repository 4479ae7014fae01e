"""The alerting rules, and the service level objective (SLO) that the first of them defends."""

from __future__ import annotations

from typing import Any

from headrace.monitoring.promql import family, series

SLO_TARGET = 0.99
SLO_TTFT_SECONDS = 2.5
"""Of all requests, the share SLO_TARGET is to have its first token within so many seconds. It must
be a bound of the histogram."""

# Windows that both must burn, how many times faster than the budget allows, and who is told. 14.4
# times uses up 2% of a month's budget in an hour, 6 times 5% in six hours (Google's SRE workbook,
# chapter "Alerting on SLOs").
BURN_RATES = (
    ("1h", "5m", 14.4, "page"),
    ("6h", "30m", 6.0, "page"),
    ("3d", "6h", 1.0, "ticket"),
)
WINDOWS = ("5m", "30m", "1h", "6h", "3d")

KV_LIMIT = 0.95
STEP_AGE_LIMIT = 60
ERROR_LIMIT = 0.01
JOB = "headrace.*"
"""Scrape jobs must be named so: `up` is all that a dead process has."""


def rules() -> dict[str, Any]:
    """A rules file of Prometheus."""
    return {
        "groups": [
            {"name": "headrace-slo", "interval": "30s", "rules": [*map(_burned, WINDOWS)]},
            {"name": "headrace", "rules": [*_slo_alerts(), *_alerts()]},
        ]
    }


def _burned(window: str) -> dict[str, Any]:
    """The share of requests that missed the objective: their first token came late, the queue was
    full, or the engine failed them. (One that fails after its first token counts once more.)"""
    if SLO_TTFT_SECONDS not in family("time_to_first_token_seconds", "histogram").buckets:
        raise ValueError(f"{SLO_TTFT_SECONDS} s is no bound of the histogram.")
    name = "time_to_first_token_seconds"
    in_time = series(name, f'le="{SLO_TTFT_SECONDS}"', suffix="_bucket")
    asked = (
        series(name, suffix="_count"),
        series("requests_rejected_total", 'reason="queue_full"'),
        series("requests_finished_total", 'finished_reason="error"'),
    )
    every = " or ".join(f"rate({selector}[{window}])" for selector in asked)
    expr = f"1 - sum by (model_name) (rate({in_time}[{window}]))\n  / sum by (model_name) ({every})"
    return {"record": _record(window), "expr": expr}


def _record(window: str) -> str:
    return f"headrace:slo_missed:ratio_rate{window}"


def _slo_alerts() -> list[dict[str, Any]]:
    alerts = []
    for severity in ("page", "ticket"):
        conditions = [
            f"({_record(long)} > {rate * (1 - SLO_TARGET):.4g}"
            f" and {_record(short)} > {rate * (1 - SLO_TARGET):.4g})"
            for long, short, rate, told in BURN_RATES
            if told == severity
        ]
        alerts.append(
            _alert(
                "HeadraceSLOBurn",
                "\nor\n".join(conditions),
                wait="2m" if severity == "page" else "15m",
                severity=severity,
                summary="{{ $labels.model_name }} misses its SLO: {{ $value | humanizePercentage }}"
                f" of requests without a first token within {SLO_TTFT_SECONDS} s",
                action="Look at Waiting and Time in the queue: add replicas if they rise, otherwise"
                " at Length of a decode step and at what else runs on the host.",
            )
        )
    return alerts


def _alerts() -> list[dict[str, Any]]:
    age, ready = series("engine_step_age_seconds"), series("engine_ready")
    known = series("door_replicas")
    known_ready = series("door_replicas", 'state="ready"')
    return [
        _alert(
            "HeadraceQueue",
            f"min_over_time({series('requests_waiting')}[10m]) > 0",
            wait="5m",
            severity="ticket",
            summary="{{ $labels.instance }} has had requests waiting for 15 minutes",
            action="The queue never empties: add replicas, or lower the load.",
        ),
        _alert(
            "HeadraceKVCacheFull",
            f"{series('kv_cache_usage_ratio')} > {KV_LIMIT}",
            wait="10m",
            severity="ticket",
            summary="{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its KV cache",
            action="Requests wait for blocks and are preempted: give the cache more memory, lower"
            " max_model_len, or add replicas.",
        ),
        _alert(
            "HeadraceStuckStep",
            f"({age} > {STEP_AGE_LIMIT} and {ready} == 1)"
            f" or increase({series('engine_restarts_total')}[15m]) > 0",
            wait="1m",
            severity="page",
            summary="The engine of {{ $labels.instance }} is stuck, or was restarted",
            action="Read its log from the last step on; after step_timeout it is killed and its"
            " requests are replayed. Restart the replica if it stays stuck.",
        ),
        _alert(
            "HeadraceErrors",
            f"{_failed_share('http_requests_total', 'job, application', _V1)} > {ERROR_LIMIT}\nor\n"
            f"{_failed_share('door_requests_total', 'job, model_name')} > {ERROR_LIMIT}",
            wait="5m",
            severity="page",
            summary="{{ $value | humanizePercentage }} of answers of {{ $labels.job }}"
            " {{ $labels.application }}{{ $labels.model_name }} are 5xx",
            action="HTTP answers shows which status, the log says why under the request's id.",
        ),
        _alert(
            "HeadraceReplicaDown",
            f'up{{job=~"{JOB}"}} == 0 or {ready} == 0 or\n'
            f"(sum by (job, model_name) ({known_ready}) == 0"
            f" and sum by (job, model_name) ({known}) > 0)",
            wait="5m",
            severity="page",
            summary="{{ $labels.instance }} {{ $labels.model_name }} of {{ $labels.job }} is out of"
            " reach or has no engine",
            action="See whether the process lives and what its log ends with; raise `for` if your"
            " model takes longer to load.",
        ),
    ]


_V1 = 'route=~"/v1/.*"'


def _failed_share(name: str, by: str, *matchers: str) -> str:
    """Of answers: those with a 5xx."""
    failed = series(name, *matchers, 'status=~"5.."')
    answered = series(name, *matchers)
    return f"sum by ({by}) (rate({failed}[5m])) / sum by ({by}) (rate({answered}[5m]))"


def _alert(
    name: str, expr: str, *, wait: str, severity: str, summary: str, action: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "description": action,
            "runbook": f"docs/monitoring.md#{name.lower()}",
        },
    }
