"""docs/autoscaling.md: its examples are accepted, its queries ask for what there is, and add up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.deploy.autoscaling import problems
from headrace.deploy.sizing import Targets
from headrace.observability.families import FAMILIES
from headrace.route import metrics, waking
from headrace.route.config import parse_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "autoscaling.md").read_text()
TABLES = {family.full_name: family for family in (*FAMILIES, *metrics.FAMILIES, *waking.FAMILIES)}
RAY, DOOR, KEDA = [
    yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
]
TRIGGERS = {trigger["name"]: trigger["metadata"] for trigger in KEDA["spec"]["triggers"]}
SERIES = {
    'headrace_prefix_cache_queries_total{model_name="smollm", instance="a"}': "0+60000x10",
    'headrace_prefix_cache_queries_total{model_name="smollm", instance="b"}': "0+90000x10",
    'headrace_prefix_cache_hits_total{model_name="smollm", instance="a"}': "0+6000x10",
    'headrace_prefix_cache_hits_total{model_name="smollm", instance="b"}': "0+0x10",
    'headrace_prefill_tokens_per_second{model_name="smollm", instance="a"}': "1000x10",
    'headrace_prefill_tokens_per_second{model_name="smollm", instance="b"}': "3000x10",
    'headrace_queued_prompt_tokens{model_name="smollm", instance="a"}': "500x10",
    'headrace_queued_prompt_tokens{model_name="smollm", instance="b"}': "6000x10",
    'headrace_decode_step_seconds{model_name="smollm", instance="a"}': "0.05x10",
    'headrace_decode_step_seconds{model_name="smollm", instance="b"}': "0.2x10",
    'headrace_requests_running{model_name="smollm", instance="a"}': "3x10",
    'headrace_requests_running{model_name="smollm", instance="b"}': "0x10",
    'headrace_kv_cache_usage_ratio{model_name="smollm", instance="a"}': "0.5x10",
    'headrace_kv_cache_usage_ratio{model_name="smollm", instance="b"}': "0.75x10",
    'headrace_door_queued_requests{model_name="smollm", instance="door"}': "7x10",
}
"""Two replicas and a door, a value a minute, in promtool's notation."""
EXPECTED = {
    "prefill": (1000 + 1500 - 100) / 2000,
    "wait": 500 / 1000 + 6000 / 3000,
    "tpot": 0.05,
    "kv-cache": 1.25,
    "door": 7.0,
}


def test_the_ray_example_is_accepted() -> None:
    from ray.serve.config import AutoscalingConfig

    assert problems(RAY["autoscaling_config"]) == []
    AutoscalingConfig(**RAY["autoscaling_config"])


def test_the_table_of_arguments_is_the_models() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (.*) \|$", PAGE, re.M)
    fields = Targets.model_fields
    assert rows == [(name, str(it.default), it.description) for name, it in fields.items()]


def test_measured_numbers_are_those_of_the_results() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "autoscaling.json").read_text())["rows"]
    cells = [f"{100 * row['attained']:.1f}% / {row['replica_hours']:.2f}" for row in rows]
    quoted = re.findall(r"\d+\.\d% / \d+\.\d\d", PAGE)
    assert len(quoted) > 20
    assert set(quoted) == set(cells)


def test_the_door_example_is_accepted() -> None:
    wake = parse_config(DOOR, origin="page").models["smollm"].wake
    assert wake is not None
    assert (wake.queue, wake.deadline_s) == (100, 120)


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_query_asks_for_families_and_labels_that_there_are(name: str) -> None:
    selectors = re.findall(r"(headrace_\w+)(\{[^}]*\})", TRIGGERS[name]["query"])
    assert len(selectors) == len(re.findall(r"headrace_", TRIGGERS[name]["query"]))
    for family, labels in selectors:
        assert labels == '{model_name="smollm"}'
        assert "model_name" in TABLES[family].labels, family


def test_names_in_the_text_are_those_of_the_tables() -> None:
    assert set(re.findall(r"\bheadrace_\w+", PAGE)) <= TABLES.keys()


def test_queries_give_the_sums_that_their_thresholds_divide(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    assert EXPECTED.keys() == TRIGGERS.keys()
    checks: list[dict[str, Any]] = [
        {
            "expr": metadata["query"],
            "eval_time": "8m",
            "exp_samples": [{"labels": "{}", "value": EXPECTED[name]}],
        }
        for name, metadata in TRIGGERS.items()
    ]
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    content = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": checks}]}
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps(content))
    ran = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
