"""Each alert fires on the trouble it is for and keeps quiet otherwise: promtool runs the rules over
time series."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from headrace.monitoring.alerts import rules

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/headrace-alerts.yaml"

DAY = 24 * 60
ON = 'model_name="m", instance="a:8000", job="headrace"'
TTFT = "headrace_time_to_first_token_seconds"


def ttft(good: str, every: str) -> dict[str, str]:
    return {f'{TTFT}_bucket{{le="2.5", {ON}}}': good, f"{TTFT}_count{{{ON}}}": every}


def http(status: str, values: str, route: str = "/v1/chat/completions") -> dict[str, str]:
    labels = f'route="{route}", method="POST", status="{status}", job="headrace"'
    return {f"headrace_http_requests_total{{{labels}}}": values}


def door(status: str, values: str) -> dict[str, str]:
    labels = f'model_name="m", status="{status}", job="headrace-door"'
    return {f"headrace_door_requests_total{{{labels}}}": values}


def known(state: str, values: str) -> dict[str, str]:
    labels = f'model_name="m", state="{state}", job="headrace-door"'
    return {f"headrace_door_replicas{{{labels}}}": values}


@dataclass(frozen=True)
class Case:
    alert: str
    severity: str
    """Of the alerts expected; empty: none of that name fires."""
    series: dict[str, str]
    """In promtool's notation, a value a minute; a value every ten for what takes days."""
    minutes: int
    """When to look."""

    @property
    def step(self) -> int:
        return 1 if self.minutes < DAY else 10


# 0+60x120: 120 more minutes of 60 requests each. Where there is no history the window of three days
# is as long as what there is.
CASES = {
    "all in time": Case("HeadraceSLOBurn", "", ttft("0+60x120", "0+60x120"), 100),
    "a fifth late for an hour": Case(
        "HeadraceSLOBurn", "page ticket", ttft("0+48x70", "0+60x70"), 66
    ),
    "a fifth late, over for forty minutes": Case(
        "HeadraceSLOBurn", "ticket", ttft("0+48x60 2940+60x60", "0+60x120"), 105
    ),
    "two in a hundred late for days": Case(
        "HeadraceSLOBurn", "ticket", ttft("0+98x440", "0+100x440"), 4400
    ),
    "within the budget": Case("HeadraceSLOBurn", "", ttft("0+995x440", "0+1000x440"), 4400),
    "a full queue": Case(
        "HeadraceSLOBurn",
        "page ticket",
        {
            **ttft("0+40x120", "0+40x120"),
            f'headrace_requests_rejected_total{{reason="queue_full", {ON}}}': "0+20x120",
        },
        120,
    ),
    "refusals that are the client's fault": Case(
        "HeadraceSLOBurn",
        "",
        {
            **ttft("0+40x120", "0+40x120"),
            f'headrace_requests_rejected_total{{reason="invalid_json", {ON}}}': "0+20x120",
        },
        120,
    ),
    "an engine that fails requests": Case(
        "HeadraceSLOBurn",
        "page ticket",
        {
            **ttft("0+40x120", "0+40x120"),
            f'headrace_requests_finished_total{{finished_reason="error", {ON}}}': "0+20x120",
        },
        120,
    ),
    "no traffic": Case("HeadraceSLOBurn", "", ttft("0x120", "0x120"), 120),
    "a queue that stays": Case(
        "HeadraceQueue", "ticket", {f"headrace_requests_waiting{{{ON}}}": "0x5 3x30"}, 30
    ),
    "a queue that empties": Case(
        "HeadraceQueue", "", {f"headrace_requests_waiting{{{ON}}}": "9x8 0 9x8 0 9x8"}, 26
    ),
    "a full cache": Case(
        "HeadraceKVCacheFull", "ticket", {f"headrace_kv_cache_usage_ratio{{{ON}}}": "0.99x30"}, 15
    ),
    "a cache in good use": Case(
        "HeadraceKVCacheFull", "", {f"headrace_kv_cache_usage_ratio{{{ON}}}": "0.9x30"}, 15
    ),
    "a stuck step": Case(
        "HeadraceStuckStep",
        "page",
        {
            f"headrace_engine_step_age_seconds{{{ON}}}": "0x5 0+60x10",
            f"headrace_engine_ready{{{ON}}}": "1x15",
        },
        10,
    ),
    "a model that loads": Case(
        "HeadraceStuckStep",
        "",
        {
            f"headrace_engine_step_age_seconds{{{ON}}}": "0+60x10",
            f"headrace_engine_ready{{{ON}}}": "0x10",
        },
        10,
    ),
    "a restarted engine": Case(
        "HeadraceStuckStep", "page", {f"headrace_engine_restarts_total{{{ON}}}": "0x5 1x10"}, 8
    ),
    "a restart long ago": Case(
        "HeadraceStuckStep", "", {f"headrace_engine_restarts_total{{{ON}}}": "0x5 1x40"}, 30
    ),
    "one in ten is a 500": Case(
        "HeadraceErrors", "page", {**http("200", "0+90x20"), **http("500", "0+10x20")}, 15
    ),
    "one in a thousand is a 500": Case(
        "HeadraceErrors", "", {**http("200", "0+999x20"), **http("500", "0+1x20")}, 15
    ),
    "the door has no replica": Case("HeadraceErrors", "page", door("503", "0+9x20"), 15),
    "the door's clients err": Case("HeadraceErrors", "", door("404", "0+9x20"), 15),
    "clients err": Case(
        "HeadraceErrors", "", {**http("200", "0+90x20"), **http("429", "0+90x20")}, 15
    ),
    "only probes fail": Case(
        "HeadraceErrors", "", {**http("200", "0+90x20"), **http("503", "0+90x20", "/readyz")}, 15
    ),
    "a process is gone": Case(
        "HeadraceReplicaDown", "page", {'up{job="headrace", instance="a:8000"}': "1x5 0x20"}, 15
    ),
    "somebody else's process is gone": Case(
        "HeadraceReplicaDown", "", {'up{job="node", instance="a:9100"}': "0x20"}, 15
    ),
    "an engine is gone": Case(
        "HeadraceReplicaDown", "page", {f"headrace_engine_ready{{{ON}}}": "1x5 0x20"}, 15
    ),
    "all replicas of a model are down": Case(
        "HeadraceReplicaDown",
        "page",
        {**known("ready", "2x5 0x20"), **known("down", "0x5 2x20")},
        15,
    ),
    "one of two is down": Case(
        "HeadraceReplicaDown", "", {**known("ready", "1x20"), **known("down", "1x20")}, 15
    ),
    "a model sleeps": Case(
        "HeadraceReplicaDown", "", {**known("ready", "0x20"), **known("down", "0x20")}, 15
    ),
    "a quick restart": Case(
        "HeadraceReplicaDown", "", {f"headrace_engine_ready{{{ON}}}": "1x5 0x3 1x20"}, 15
    ),
}


def alerting_rules() -> list[dict[str, object]]:
    return [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]


def test_each_alert_is_seen_to_fire_and_not_to_fire() -> None:
    names = {str(rule["alert"]) for rule in alerting_rules()}
    assert len(names) == 6
    assert names == {case.alert for case in CASES.values() if case.severity}
    assert names == {case.alert for case in CASES.values() if not case.severity}


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_the_burn_alert_has_both_severities(severity: str) -> None:
    cases = [case for case in CASES.values() if case.alert == "HeadraceSLOBurn"]
    assert any(severity in case.severity.split() for case in cases)


@pytest.mark.parametrize("step", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_alerts_in_promtool(promtool: str, tmp_path: Path, step: int) -> None:
    """Of all cases with that step, in one run; promtool names those that fail."""
    tests = []
    for name, case in CASES.items():
        if case.step != step:
            continue
        tests.append(
            {
                "name": name,
                "interval": f"{step}m",
                "input_series": [{"series": s, "values": v} for s, v in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": "count by (alertname, severity) "
                        f'(ALERTS{{alertname="{case.alert}", alertstate="firing"}})',
                        "eval_time": f"{case.minutes}m",
                        "exp_samples": [
                            {
                                "labels": f'{{alertname="{case.alert}", severity="{severity}"}}',
                                "value": 1,
                            }
                            for severity in case.severity.split()
                        ],
                    }
                ],
            }
        )
    path = tmp_path / "tests.yaml"
    content = {"rule_files": [str(RULES)], "evaluation_interval": f"{step}m", "tests": tests}
    path.write_text(yaml.safe_dump(content))
    result = subprocess.run(
        [promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_runbook() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    headings = {match.lower() for match in re.findall(r"^#+ (\w+)$", page, re.M)}
    for rule in alerting_rules():
        annotations = rule["annotations"]
        assert isinstance(annotations, dict) and annotations["description"]
        path, _, anchor = annotations["runbook"].partition("#")
        assert path == "docs/monitoring.md" and anchor in headings
