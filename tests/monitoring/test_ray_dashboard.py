"""Ray's own dashboard for LLMs reads what a replica exports under Ray's names for vLLM's."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.conftest import PATIENCE, free_port
from tests.monitoring.conftest import running_prometheus

from headrace.engine.client import EngineStats, FinishReason, RequestRecord
from headrace.observability.metrics import Metrics
from headrace.route.targets import http_sd

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


# --- a real Ray ---------------------------------------------------------------------------------

REPLICA = """
import os, sys, time, ray
from ray import serve
from headrace.deploy.ray_serve import BuildArgs, build_app

metrics_port, dashboard_port, folder = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 << 20, _metrics_export_port=int(metrics_port),
         include_dashboard=True, dashboard_port=int(dashboard_port), _temp_dir=folder,
         log_to_driver=False)
serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": 0})
options = {"threads": 2, "kv_cache_memory_bytes": 256 << 20, "max_model_len": 1024}
serve.run(build_app(BuildArgs(options=options)), name="small")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
SWITCHES = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


@pytest.fixture(scope="module")
def ray_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Ports of the metrics of Ray's node and of its dashboard; one replica serves on it."""
    ports = (free_port(), free_port())
    log = tmp_path_factory.mktemp("ray-monitoring") / "log"
    roots = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    minimum = free_port()
    folder = tmp_path_factory.mktemp("r")
    environment = {
        **os.environ,
        **SWITCHES,
        "PYTHONPATH": roots,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(minimum),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(minimum + 20),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", REPLICA, *map(str, ports), str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while "ready" not in log.read_text().split():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield ports
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def replica_urls(dashboard_port: int) -> list[str]:
    """Of the application's replicas, by Serve's REST."""
    url = f"http://127.0.0.1:{dashboard_port}/api/serve/applications/"
    groups = httpx.get(url, timeout=PATIENCE).json()["target_groups"]
    return [
        f"http://{target['ip']}:{target['port']}"
        for group in groups
        if group["protocol"] == "HTTP" and group["app_name"] == "small"
        for target in group["targets"]
    ]


@pytest.mark.slow
def test_rays_dashboard_has_data(
    prometheus: str, ray_ports: tuple[int, int], tmp_path: Path
) -> None:
    """In a Prometheus that scrapes Ray's node and the replica, every query that can be served is,
    joined by worker."""
    (url,) = replica_urls(ray_ports[1])
    (tmp_path / "replicas.json").write_bytes(http_sd({"small": [url]}))
    node = {"targets": [f"127.0.0.1:{ray_ports[0]}"]}
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "ray", "static_configs": [node]},
            {"job_name": "headrace", "file_sd_configs": [{"files": ["replicas.json"]}]},
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
        deadline = time.monotonic() + 45
        while empty and time.monotonic() < deadline:
            _send_requests(url)
            empty = {
                title: expr
                for title, expr in wanted.items()
                if all(math.isnan(value) for value in found.query(expr))
            }
        assert not empty, "\n\n".join(f"{title}\n{expr}" for title, expr in empty.items())
        # Ray exports none of these itself: nothing is counted twice.
        jobs = found.ask("query", query='count by (job) ({__name__=~"ray_vllm_.*"})')["result"]
        assert [series["metric"]["job"] for series in jobs] == ["headrace"]


def _send_requests(url: str) -> None:
    for number in range(4):
        body = {"prompt": "A mill by a river " * 8 + str(number), "max_tokens": 12}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
