"""What several processes observe, put together; processes that die leave what they counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from headrace.observability.merged import MergedMetrics
from headrace.observability.metrics import Metrics

OBSERVE = """
import os, signal
from types import SimpleNamespace
from headrace.observability.metrics import Metrics
metrics = Metrics("m", read_elsewhere=True)
for number in range(3):
    meter = metrics.track(f"r{number}", 0.0)
    meter.tokens(4, now=0.5)
    meter.tokens(2, now=1.5)
metrics.observe_request(SimpleNamespace(
    request_id="r0", finish_reason="length", prompt_tokens=5, output_tokens=6, cached_tokens=0,
    preemptions=0, arrival_time=0.0, scheduled_time=0.25, first_token_time=0.5, finished_time=1.5,
    max_tokens=6))
metrics.observe_http("/v1/completions", "POST", 200, 0.125)
metrics.observe_rejected("queue_full")
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def observe(folder: Path) -> int:
    """An API process that ends three requests' accounts but one, and is killed. Its pid."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", OBSERVE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout, result.stderr
    return int(result.stdout)


def samples(metrics: Metrics) -> dict[str, float]:
    """ "name{labels but the model's}" -> value"""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(v for k, v in sample.labels.items() if k != "model_name")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_processes_are_summed_and_the_engine_is_counted_once(tmp_path: Path) -> None:
    metrics = MergedMetrics("m", tmp_path)
    before = samples(metrics)
    pids = [observe(tmp_path) for _ in range(2)]
    metrics.observe_stats(
        SimpleNamespace(
            running=2,
            waiting=1,
            kv_blocks_used=3,
            kv_blocks_total=10,
            prefix_query_tokens=8,
            prefix_hit_tokens=4,
            preemptions=0,
            oom_retries=0,
            steps=7,
            step_tokens=2,
        )
    )
    after = samples(metrics)
    assert before.keys() <= after.keys()
    for prefix in ("headrace_", "vllm:"):
        assert after[prefix + "generation_tokens_total"] == 2 * 3 * 6
        assert after[prefix + "inter_token_latency_seconds_count"] == 2 * 3 * 5
        assert after[prefix + "inter_token_latency_seconds_bucket{0.5}"] == 2 * 3 * 5
        assert after[prefix + "inter_token_latency_seconds_bucket{0.3}"] == 2 * 3 * 3
        assert after[prefix + "time_to_first_token_seconds_sum"] == 2 * 3 * 0.5
    assert after["headrace_requests_accepted_total"] == 6
    assert after["headrace_requests_finished_total{length}"] == 2
    assert after["headrace_http_requests_total{POST,/v1/completions,200}"] == 2
    assert after["headrace_requests_rejected_total{queue_full}"] == 2
    assert after["headrace_engine_steps_total"] == 7
    assert after["headrace_iteration_tokens_count"] == 1
    assert after["headrace_kv_cache_blocks{free}"] == 7

    for number, pid in enumerate(pids, start=1):
        metrics.retire(pid)
        kept = samples(metrics)
        for name, value in after.items():
            if name.endswith(("_total", "_count", "_sum", "}")) and "process_" not in name:
                assert kept[name] >= value or "host_" in name, name
        assert kept["headrace_requests_finished_total{abort}"] == 2 * number
    assert kept["headrace_requests_accepted_total"] == 6 == 2 + 4
    assert {path.name for path in tmp_path.iterdir()} == {"counter_ended.db", "histogram_ended.db"}
