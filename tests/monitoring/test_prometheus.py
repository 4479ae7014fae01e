"""A real Prometheus scrapes a real server under load; every query of the dashboard has data there,
or a reason for having none."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import OpenAI
from tests.e2e.conftest import PATIENCE, Server
from tests.monitoring.conftest import Prometheus, running_door, running_prometheus

from headrace.monitoring.grafana import variable_query
from headrace.monitoring.panels import ROWS, VARIABLES
from headrace.observability.resources import open_gpus

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
WINDOW = "20s"
MODEL = "SmolLM2-135M-Instruct"
EMPTY_HERE = {"ray", "refusals", "versions", "waking", *(() if open_gpus() else ("gpu",))}
"""Needs of panels that are not met here: Ray's own metrics, replicas that refuse what the door
sends, a folder of versions, models that sleep, perhaps a GPU."""


@pytest.fixture(scope="module")
def doors(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """URLs of two doors to the server."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("doors")
        yield [
            stack.enter_context(
                running_door(folder / f"log-{number}", "--replica", f"{MODEL}={server.url}")
            )
            for number in range(2)
        ]


@pytest.fixture(scope="module")
def scraping(
    prometheus: str, doors: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "deploy/prometheus/headrace-alerts.yaml")],
        "scrape_configs": [
            {
                "job_name": "headrace",
                "http_sd_configs": [{"url": f"{door}/targets"} for door in doors],
            },
            {
                "job_name": "headrace-door",
                "static_configs": [{"targets": [door.removeprefix("http://") for door in doors]}],
            },
        ],
    }
    with running_prometheus(
        prometheus, tmp_path_factory.mktemp("prometheus"), config, WINDOW
    ) as found:
        yield found


@pytest.fixture(scope="module")
def loaded(server: Server, doors: list[str], scraping: Prometheus) -> Prometheus:
    """After a load of half a window through a door, with a few requests that fail."""
    scraping.wait_for(f'headrace_engine_ready{{application="{MODEL}"}}')
    client = OpenAI(base_url=f"{doors[0]}/v1", api_key="any", max_retries=0, timeout=PATIENCE)
    end = time.monotonic() + 10

    def stream(number: int) -> None:
        while time.monotonic() < end:
            story = "Once upon a time there was a mill by a river. " * 6
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"{story} {number}"}],
                max_tokens=24,
                stream=True,
            )
            for _ in answer:
                pass

    for _ in range(3):
        too_long = {"model": MODEL, "prompt": "word " * 5000, "max_tokens": 1}
        assert server.post("/v1/completions", too_long).status_code == 400
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(stream, number) for number in range(4)]:
            future.result()
    time.sleep(1.5)  # one more scrape
    return scraping


def test_every_panel_has_data(loaded: Prometheus) -> None:
    for row in ROWS:
        for panel in row.panels:
            if panel.needs in EMPTY_HERE:
                for query in panel.queries:
                    loaded.query(query.expr)  # which Prometheus must still understand
                continue
            for query in panel.queries:
                values = [value for value in loaded.query(query.expr) if not math.isnan(value)]
                assert values, f"{row.title} / {panel.title}: {query.expr}"


def test_busy_panels_show_the_load(loaded: Prometheus) -> None:
    shown = {panel.title: panel.queries for row in ROWS for panel in row.panels}
    for title in (
        "Requests finished",
        "Tokens",
        "Steps",
        "Length of a decode step",
        "Prefix cache hits",
    ):
        for query in shown[title]:
            assert max(loaded.query(query.expr)) > 0, title
    assert all(value == 0 for value in loaded.query(shown["Share of 5xx"][0].expr))


def test_variables_have_values(loaded: Prometheus) -> None:
    values = {}
    for name in VARIABLES:
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable_query(name))
        assert found
        selector = re.sub(r"\$\w+", ".*", found[1])
        values[name] = loaded.ask(f"label/{found[2]}/values", **{"match[]": selector})
    assert values["application"] == [MODEL]
    assert all(len(found) == 1 for found in values.values())


def test_a_replica_that_two_doors_name_is_scraped_once(loaded: Prometheus, server: Server) -> None:
    assert loaded.query('count(up{job="headrace"})') == [1]
    targets = loaded.ask("targets")["activeTargets"]
    (target,) = (target for target in targets if target["labels"]["job"] == "headrace")
    address = server.url.removeprefix("http://")
    assert target["labels"] == {
        "instance": address,
        "job": "headrace",
        "application": MODEL,
        "replica": address,
        "model": MODEL,
    }
    # Nothing is counted twice: Prometheus has what the server says.
    server.wait_idle()
    time.sleep(1.5)
    counted = loaded.query("sum(headrace_requests_finished_total)")
    assert counted == [server.finished()]


def test_alerts_are_evaluated_without_errors(loaded: Prometheus) -> None:
    # Of the group that is evaluated every 30 s.
    loaded.wait_for("headrace:slo_missed:ratio_rate5m")
    rules = [rule for group in loaded.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, json.dumps(rules, indent=1)
    assert loaded.query('ALERTS{alertstate="firing"}') == []
