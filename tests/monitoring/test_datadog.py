"""Datadog's own OpenMetrics check reads a real server with the configuration that ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.conftest import PATIENCE, Server

from headrace.observability.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy/datadog/openmetrics.d/conf.yaml"
SITE = Path(os.environ.get("DATADOG_SITE", Path(sys.prefix) / "datadog"))
"""Where `make test-full` puts Datadog's packages: they want older versions than ours."""

# Two runs: the check takes the first value of a counter as the point to count from.
CHECK = """
import json, sys, yaml
from datadog_checks.base import OpenMetricsBaseCheckV2
from datadog_checks.base.stubs import aggregator

class Check(OpenMetricsBaseCheckV2):
    DEFAULT_METRIC_LIMIT = 2000  # as in the Agent's openmetrics check

instance, = yaml.safe_load(open(sys.argv[1]))["instances"]
assert instance.pop("openmetrics_endpoint") == "http://localhost:8000/metrics"
check = Check("openmetrics", {}, [dict(instance, openmetrics_endpoint=sys.argv[2])])
failures = [check.run(), check.run()]
buckets = sorted({s.name for name in aggregator._histogram_buckets
                  for s in aggregator.histogram_bucket(name)})
print(json.dumps({
    "failures": failures,
    "metrics": {name: [[m.type, m.value, m.tags] for m in aggregator.metrics(name)]
                for name in aggregator.metric_names},
    "buckets": buckets,
    "contexts": sum(len(aggregator.metrics(name)) for name in aggregator.metric_names),
    "health": [c.status for c in aggregator.service_checks("headrace.openmetrics.health")],
}))
"""


@pytest.fixture(scope="module")
def checked(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two runs of the check would have told Datadog."""
    if not (SITE / "datadog_checks").is_dir():
        pytest.skip(f"Datadog's checks are not in {SITE} (make test-full installs them)")
    client, name = server.client(), server.get("/v1/models").json()["data"][0]["id"]
    client.completions.create(model=name, prompt="A mill by a river", max_tokens=8)
    too_long = {"model": name, "prompt": "word " * 5000, "max_tokens": 1}
    assert server.post("/v1/completions", too_long).status_code == 400
    script = tmp_path_factory.mktemp("datadog") / "check.py"  # the library asks where __main__ is
    script.write_text(CHECK)
    result = subprocess.run(
        [sys.executable, "-P", str(script), str(CONFIGURATION), f"{server.url}/metrics"],
        env={**os.environ, "PYTHONPATH": str(SITE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_the_check_runs_and_is_healthy(checked: dict[str, Any]) -> None:
    assert checked["failures"] == ["", ""]
    assert checked["health"] == [0, 0]
    assert checked["contexts"] < 1000


def test_datadog_gets_what_is_mapped(checked: dict[str, Any]) -> None:
    told = {*checked["metrics"], *checked["buckets"]}
    (instance,) = yaml.safe_load(CONFIGURATION.read_text())["instances"]
    mapped = {name for entry in instance["metrics"] for name in entry.values()}
    expected = {f.name for f in FAMILIES if f.name.removesuffix("_total") in mapped}
    for family in (f for f in FAMILIES if f.name in expected):
        if family.name.startswith(("gpu_", "model_version", "model_loads")):
            continue  # without a GPU, without a folder of versions
        name = "headrace." + family.name.removesuffix("_total")
        names = {name, f"{name}.count", f"{name}.bucket"}
        assert names & told, f"{family.name} did not arrive"


def test_values_are_the_servers(checked: dict[str, Any]) -> None:
    ((_, value, tags), *_) = checked["metrics"]["headrace.engine_ready"]
    assert value == 1 and any(tag.startswith("model_name:") for tag in tags)
    ((_, _, tags),) = checked["metrics"]["headrace.model_info"][-1:]
    assert any(tag.startswith("headrace_version:") for tag in tags)
