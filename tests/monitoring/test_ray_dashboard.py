"""Ray's own dashboard for LLMs reads what a replica exports under Ray's names for vLLM's."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.conftest import PATIENCE, free_port
from tests.monitoring.conftest import Prometheus, running_door, running_prometheus

from headrace.deploy.past_ray import NAME as PAST_RAY
from headrace.deploy.past_ray import CountingPastRay, PastRay
from headrace.engine.client import EngineStats, FinishReason, RequestRecord
from headrace.monitoring.panels import ROWS
from headrace.observability.metrics import Metrics

with warnings.catch_warnings(action="ignore"):  # of Ray's own code, when it is first imported
    from ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels import (
        serve_llm_dashboard_config,
    )

ROOT = Path(__file__).parents[2]

OFFLOADED = "the KV cache has one tier: nothing is offloaded, so there is no other cache to ask"
NOT_SERVED = {
    r"ray_vllm_num_requests_swapped": "nothing is swapped out: who is preempted is computed again",
    r"ray_vllm_nixl_.*": "no KV is sent between engines",
    r"ray_vllm_kv_offload_.*": OFFLOADED,
    r"ray_vllm_external_prefix_cache_.*": OFFLOADED,
}
"""Names in Ray's dashboard that no replica exports, and why."""
RAYS_OWN = r"ray_serve_.*"


def queries() -> dict[str, str]:
    """`panel title / legend` -> expression, for everything, as Grafana sends them."""
    found = {}
    for row in serve_llm_dashboard_config.rows:
        for panel in row.panels:
            for target in panel.targets:
                expr = target.expr.format(global_filters='ray_io_cluster=~"$Cluster"')
                expr = expr.replace("$interval", "30s")
                found[f"{panel.title} / {target.legend}"] = re.sub(r"\$\w+", ".*", expr)
    return found


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expr)) - {"ray_io_cluster"}


def reason(name: str) -> str:
    """Why nobody exports it, if so."""
    return next((why for text, why in NOT_SERVED.items() if re.fullmatch(text, name)), "")


def exported() -> dict[str, set[str]]:
    """Names of samples with our prefix of Ray's -> labels, of a replica that has served."""
    metrics = Metrics("m")
    metrics.alias_as("ray_vllm_", WorkerId="w")
    metrics.observe_stats(EngineStats(running=1, kv_blocks_used=1, kv_blocks_total=4, steps=1))
    metrics.observe_request(
        RequestRecord(
            request_id="r",
            finish_reason=FinishReason.STOP,
            prompt_tokens=4,
            output_tokens=4,
            cached_tokens=0,
            preemptions=0,
            arrival_time=1.0,
            scheduled_time=2.0,
            first_token_time=3.0,
            finished_time=4.0,
            max_tokens=4,
        )
    )
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name.startswith("ray_")
    }


def test_every_name_of_rays_dashboard_is_exported_or_has_a_reason() -> None:
    ours, asked = exported(), set().union(*map(names_in, queries().values()))
    assert len(asked) > 20
    for name in asked:
        if re.fullmatch(RAYS_OWN, name):
            continue
        assert (name in ours) != bool(reason(name)), name
        if name in ours:
            assert {"model_name", "WorkerId"} <= ours[name]
    for text in NOT_SERVED:
        assert any(re.fullmatch(text, name) for name in asked), f"{text} is asked for no more"


def test_rays_names_are_exposed_in_a_replica_only() -> None:
    text = Metrics("m").render().decode()
    assert "ray_vllm" not in text and "vllm:num_requests_running" in text


def test_rays_names_carry_the_same_numbers() -> None:
    metrics = Metrics("m")
    metrics.alias_as("ray_vllm_", WorkerId="w")
    metrics.observe_stats(EngineStats(running=3, steps=1))
    lines = metrics.render().decode().splitlines()
    assert 'headrace_requests_running{model_name="m"} 3.0' in lines
    assert 'ray_vllm_num_requests_running{WorkerId="w",model_name="m"} 3.0' in lines


async def test_requests_at_the_replicas_own_port_are_counted_under_rays_name() -> None:
    asked = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])

    metrics = Metrics("m")
    counted = PastRay(application="a", deployment="d", replica="r", worker="w")
    metrics.registry.register(counted)
    line = f'{PAST_RAY}_total{{WorkerId="w",application="a",deployment="d",replica="r"}} '
    assert f"{line}0.0" in metrics.render().decode()  # for the join, before any request
    counting = CountingPastRay(app, counted)
    counted.port = 31000
    for path, port in (("/v1/models", 31000), ("/v1/models", 8000), ("/load", 31000)):
        scope = {"type": "http", "path": path, "server": ("10.0.0.1", port)}
        await counting(scope, None, None)  # type: ignore[arg-type]
    assert f"{line}1.0" in metrics.render().decode() and len(asked) == 3


# --- a real Ray ---------------------------------------------------------------------------------

REPLICA = """
import sys, ray
from ray import serve
from headrace.deploy.ray_serve import BuildArgs, build_app

metrics_port, folder = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 << 20, _metrics_export_port=int(metrics_port),
         include_dashboard=False, _temp_dir=folder, log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options={"port": 0})
options = {"threads": 2, "kv_cache_memory_bytes": 256 << 20, "max_model_len": 1024}
serve.run(build_app(BuildArgs(options=options)), name="small")
print("ready", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
SWITCHES = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}
HEALTHY = "ray_serve_deployment_replica_healthy"
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Cluster:
    metrics: str
    """Address at which Ray's node has its metrics."""
    door: str
    """URL of a door that has its replicas from Ray's registry."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of this machine with one replica, and a door to it."""
    # Names of sockets may have 107 bytes, and Ray adds most of them.
    with TemporaryDirectory(prefix="hr") as short:
        yield from running_cluster(Path(short))


def running_cluster(folder: Path) -> Iterator[Cluster]:
    metrics, log = f"127.0.0.1:{free_port()}", folder / "log"
    roots = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    command = [sys.executable, "-P", "-c", REPLICA, metrics.partition(":")[2], str(folder / "ray")]
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        for name, value in SWITCHES.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": roots},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while (ready := re.search(r"^ready (\S+)$", log.read_text(), re.M)) is None:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            content = {"models": {MODEL: {"application": "small"}}, "ray": {"address": ready[1]}}
            (folder / "door.yaml").write_text(json.dumps(content))
            with running_door(folder / "door-log", folder / "door.yaml") as door:
                yield Cluster(metrics, door)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rays_dashboard_has_data(prometheus: str, cluster: Cluster, tmp_path: Path) -> None:
    """In a Prometheus that scrapes Ray's node and the replicas that the door names, every query
    that can be served is, joined by worker."""
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "ray", "static_configs": [{"targets": [cluster.metrics]}]},
            {"job_name": "headrace", "http_sd_configs": [{"url": f"{cluster.door}/targets"}]},
        ],
    }
    wanted = {
        title: expr
        for title, expr in queries().items()
        if not any(reason(name) for name in names_in(expr))
    }
    assert len(wanted) > 30
    with running_prometheus(prometheus, tmp_path, config, "30s") as found:
        empty = wanted
        deadline = time.monotonic() + 100  # one query looks at whole minutes
        while empty and time.monotonic() < deadline:
            _send_requests(cluster.door)
            empty = {
                title: expr
                for title, expr in wanted.items()
                if all(math.isnan(value) for value in found.query(expr))
            }
        assert not empty, "\n\n".join(f"{title}\n{expr}" for title, expr in empty.items())
        # Ray exports none of these itself: nothing is counted twice.
        jobs = found.ask("query", query='count by (job) ({__name__=~"ray_vllm_.*"})')["result"]
        assert [series["metric"]["job"] for series in jobs] == ["headrace"]
        assert found.query('count(up{job="headrace", application="small"} == 1)') == [1]
        # The labels of what came past Ray are those that Ray uses. `replica` is a target's, too,
        # as the door names it, so Prometheus renames this one.
        for label, theirs in (*zip(SHARED, SHARED, strict=True), ("exported_replica", "replica")):
            assert values(found, f"{PAST_RAY}_total", label) == values(found, HEALTHY, theirs)
        # And ours shows how many replicas Ray runs.
        (healthy,) = (p for row in ROWS for p in row.panels if p.title.startswith("Replicas: wan"))
        assert any(found.query(query.expr) for query in healthy.queries)


SHARED = ("application", "deployment")


def values(prometheus: Prometheus, metric: str, label: str) -> list[str]:
    """Of a label, in all series of the metric."""
    found = prometheus.ask("query", query=f"count by ({label}) ({metric})")["result"]
    return sorted(series["metric"][label] for series in found)


def _send_requests(url: str) -> None:
    for number in range(4):
        body = {"model": MODEL, "prompt": "A mill by a river " * 8 + str(number), "max_tokens": 12}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
