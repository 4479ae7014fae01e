"""The files under deploy/ are what the code makes, and what Grafana and Prometheus can read."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.monitoring.datadog import openmetrics
from headrace.monitoring.files import files
from headrace.monitoring.grafana import dashboard, variable_query
from headrace.monitoring.panels import ROWS, VARIABLES
from headrace.monitoring.promql import Selection, series
from headrace.observability.families import FAMILIES

ROOT = Path(__file__).parents[2]


def panels() -> list[dict[str, Any]]:
    return list(dashboard()["panels"])


def expressions() -> list[str]:
    """Of the dashboard, as Grafana sends them."""
    found = []
    for panel in panels():
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "1m")
            found.append(re.sub(r"\$\w+", ".*", text))
    return found


@pytest.mark.parametrize("name", sorted(files()))
def test_a_committed_file_is_what_is_generated(name: str) -> None:
    assert (ROOT / "deploy" / name).read_text() == files()[name], "run `make monitoring`"


def test_the_dashboard_holds_together() -> None:
    found = dashboard()
    assert json.loads(json.dumps(found)) == found
    ids = [panel["id"] for panel in panels()]
    assert ids == sorted(set(ids))
    occupied: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & occupied and place["x"] + place["w"] <= 24, panel["title"]
        occupied |= cells
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(letters)) == len(letters)
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    names = {variable["name"] for variable in found["templating"]["list"]}
    assert names == {"datasource", *VARIABLES}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(found)))
    assert used <= names | {"__rate_interval", "__all"}


def test_every_legend_names_labels_that_the_query_keeps() -> None:
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                labels = set(re.findall(r"{{(\w+)}}", query.legend))
                kept = re.search(r" by \(([^)]*)\)", query.expr)
                assert labels <= set(kept[1].split(", ") if kept else ()), panel.title


def test_promtool_reads_every_query(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"q{n}", "expr": expr} for n, expr in enumerate(expressions())]
    assert len(rules) > 50
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert check_rules(promtool, path) == ""
    assert check_rules(promtool, ROOT / "deploy/prometheus/headrace-alerts.yaml") == ""


def check_rules(promtool: str, path: Path) -> str:
    """What is wrong with the file."""
    result = subprocess.run(
        [promtool, "check", "rules", str(path)], capture_output=True, text=True, timeout=30
    )
    return "" if result.returncode == 0 else result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "matchers", "suffix", "error"),
    [
        ("requests_runing", (), "", KeyError),
        ("requests_running", ('reason="x"',), "", ValueError),
        ("requests_running", (), "_bucket", ValueError),
        ("time_to_first_token_seconds", (), "", ValueError),
        ("time_to_first_token_seconds", ('le="1.0"',), "_count", ValueError),
    ],
)
def test_what_no_table_has_is_no_query(
    name: str, matchers: tuple[str, ...], suffix: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        series(name, *matchers, suffix=suffix)


def test_kinds_are_not_mixed_up() -> None:
    chosen = Selection((), "1m")
    with pytest.raises(ValueError, match="gauge"):
        chosen.rate("requests_running")
    with pytest.raises(ValueError, match="counter"):
        chosen.gauge("preemptions_total")


def test_variables_depend_on_those_before_them() -> None:
    assert [variable_query(name) for name in VARIABLES] == [
        "label_values(headrace_model_info, model_name)",
        'label_values(headrace_model_info{model_name=~"$model"}, application)',
        'label_values(headrace_model_info{model_name=~"$model", application=~"$application"},'
        " instance)",
    ]


def test_datadog_gets_every_family_but_those_of_hosts() -> None:
    (instance,) = openmetrics()["instances"]
    mapped = {raw: name for entry in instance["metrics"] for raw, name in entry.items()}
    missing = {f.full_name.removesuffix("_total") for f in FAMILIES} - mapped.keys()
    assert all(name.startswith("headrace_host_") for name in missing) and len(missing) == 3
