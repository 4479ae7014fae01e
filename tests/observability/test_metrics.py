"""Counting: what records, meters, stats and HTTP exchanges do to the exposed samples."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from headrace.engine.client import (
    EngineState,
    EngineStats,
    FinishReason,
    ModelInfo,
    RequestRecord,
    Workload,
)
from headrace.observability.families import FAMILIES
from headrace.observability.metrics import Metrics

MODEL = 'smol "m"'


def samples(metrics: Metrics) -> dict[str, float]:
    """`name` or `name{label=value,...}` (without model_name) -> value."""
    found: dict[str, float] = {}
    for metric in text_string_to_metric_families(metrics.render().decode()):
        for sample in metric.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels.get("model_name", MODEL) == MODEL
            rest = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            key = f"{sample.name}{{{rest}}}" if rest else sample.name
            assert key not in found, f"{key} is exposed twice"
            found[key] = sample.value
    return found


def make_record(
    reason: FinishReason = FinishReason.STOP, request_id: str = "r", output_tokens: int = 5
) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        finish_reason=reason,
        prompt_tokens=10,
        output_tokens=output_tokens,
        cached_tokens=4,
        preemptions=1,
        arrival_time=100.0,
        scheduled_time=100.5,
        first_token_time=102.0,
        finished_time=106.0,
        max_tokens=64,
    )


@dataclass
class FakeEngine:
    state: EngineState = EngineState.READY
    info: ModelInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    last_seen_age: float = 0.25
    restarts: int = 0
    workload: Workload = field(default_factory=lambda: Workload(9, 500, 1250.0, 0.02))


def test_a_record_alone_fills_every_request_family() -> None:
    metrics = Metrics(MODEL)
    metrics.observe_request(make_record())
    found = samples(metrics)
    expected = {
        "requests_accepted_total": 1,
        "requests_finished_total{finished_reason=stop}": 1,
        "requests_finished_total{finished_reason=abort}": 0,
        "prompt_tokens_total": 10,
        "prompt_tokens_cached_total": 4,
        "generation_tokens_total": 5,
        "time_to_first_token_seconds_sum": 2.0,
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 1.5,
        "request_decode_time_seconds_sum": 4.0,
        "request_inference_time_seconds_sum": 5.5,
        "e2e_request_latency_seconds_sum": 6.0,
        "request_time_per_output_token_seconds_sum": 1.0,
        "request_preemptions_sum": 1,
        "request_max_tokens_sum": 64,
        "inter_token_latency_seconds_count": 0,
    }
    assert {k: found[f"headrace_{k}"] for k in expected} == expected


def test_a_meter_counts_live_and_its_record_adds_only_the_rest() -> None:
    metrics = Metrics(MODEL)
    meter = metrics.track("r", arrival_time=100.0)
    meter.tokens(1, now=102.5)
    meter.tokens(2, now=103.5)
    live = samples(metrics)
    assert live["headrace_generation_tokens_total"] == 3
    assert live["headrace_requests_accepted_total"] == 1
    assert live["headrace_time_to_first_token_seconds_sum"] == 2.5
    assert live["headrace_inter_token_latency_seconds_count"] == 2
    assert live["headrace_inter_token_latency_seconds_sum"] == 1.0
    metrics.observe_request(make_record(output_tokens=5))
    meter.tokens(2, now=104.0)  # read after the end: the record has counted them
    assert metrics.totals == (1, 5)
    closed = samples(metrics)
    assert closed["headrace_generation_tokens_total"] == 5
    assert closed["headrace_requests_accepted_total"] == 1
    assert closed["headrace_time_to_first_token_seconds_count"] == 1
    assert closed["headrace_inter_token_latency_seconds_count"] == 4
    assert closed["headrace_inter_token_latency_seconds_sum"] == 1.5


def test_tokens_that_come_with_the_first_one_have_no_gap() -> None:
    metrics = Metrics(MODEL)
    meter = metrics.track("r", arrival_time=100.0)
    meter.tokens(3, now=102.5)
    meter.tokens(1, now=103.0)
    found = samples(metrics)
    assert found["headrace_time_to_first_token_seconds_sum"] == 2.5
    assert found["headrace_inter_token_latency_seconds_count"] == 3
    assert found["headrace_inter_token_latency_seconds_sum"] == 0.5


def test_output_read_only_after_the_record_observes_one_first_token() -> None:
    metrics = Metrics(MODEL)
    meter = metrics.track("r", arrival_time=100.0)
    metrics.observe_request(make_record(output_tokens=5))
    meter.tokens(5, now=107.0)
    found = samples(metrics)
    assert found["headrace_time_to_first_token_seconds_count"] == 1
    assert found["headrace_time_to_first_token_seconds_sum"] == 2.0
    assert found["headrace_generation_tokens_total"] == 5


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FinishReason),
            st.lists(st.integers(0, 3), max_size=4),  # delivered before the record
            st.integers(0, 5),  # generated, never delivered
            st.booleans(),  # followed by a meter
        ),
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_accounts_close(
    requests: list[tuple[FinishReason, list[int], int, bool]], in_flight: int
) -> None:
    metrics = Metrics(MODEL)
    for number in range(in_flight):
        metrics.track(f"open-{number}", 0.0)
    generated = 0
    for number, (reason, delivered, lost, tracked) in enumerate(requests):
        if tracked:
            meter = metrics.track(str(number), 100.0)
            for step, count in enumerate(delivered):
                meter.tokens(count, now=101.0 + step)
        generated += (total := sum(delivered) + lost)
        metrics.observe_request(make_record(reason, str(number), total))
    found = samples(metrics)
    finished = sum(v for k, v in found.items() if k.startswith("headrace_requests_finished_total"))
    assert finished == len(requests)
    assert found["headrace_requests_accepted_total"] == finished + in_flight
    assert found["headrace_generation_tokens_total"] == generated
    assert found["headrace_request_generation_tokens_sum"] == generated
    assert found["headrace_prompt_tokens_total"] == found["headrace_request_prompt_tokens_sum"]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_unfinished_request_is_counted_but_has_no_whole_request_latency(
    reason: FinishReason,
) -> None:
    metrics = Metrics(MODEL)
    metrics.observe_request(make_record(reason))
    found = samples(metrics)
    assert found[f"headrace_requests_finished_total{{finished_reason={reason}}}"] == 1
    assert found["headrace_request_generation_tokens_sum"] == 5
    assert found["headrace_request_queue_time_seconds_count"] == 1
    assert found["headrace_e2e_request_latency_seconds_count"] == 0


def test_a_request_that_was_never_scheduled_has_no_stage_times() -> None:
    metrics = Metrics(MODEL)
    record = RequestRecord(
        request_id="r",
        finish_reason=FinishReason.DEADLINE,
        prompt_tokens=3,
        output_tokens=0,
        cached_tokens=0,
        preemptions=0,
        arrival_time=100.0,
        scheduled_time=0.0,
        first_token_time=0.0,
        finished_time=130.0,
    )
    metrics.observe_request(record)
    found = samples(metrics)
    assert found["headrace_requests_finished_total{finished_reason=deadline}"] == 1
    assert {k: v for k, v in found.items() if k.endswith("seconds_count") and v} == {}


def test_engine_counters_survive_a_restart_of_the_engine() -> None:
    metrics = Metrics(MODEL)
    for steps, hits in ((10, 100), (12, 130), (3, 20)):  # the third engine started from zero
        metrics.observe_stats(
            EngineStats(
                running=4,
                waiting=2,
                kv_blocks_used=25,
                kv_blocks_total=100,
                prefix_query_tokens=2 * hits,
                prefix_hit_tokens=hits,
                steps=steps,
                step_tokens=17,
            )
        )
    found = samples(metrics)
    assert found["headrace_engine_steps_total"] == 12 + 3
    assert found["headrace_prefix_cache_hits_total"] == 130 + 20
    assert found["headrace_prefix_cache_queries_total"] == 300
    assert found["headrace_iteration_tokens_count"] == 3
    assert found["headrace_kv_cache_usage_ratio"] == 0.25
    assert found["headrace_kv_cache_blocks{state=free}"] == 75
    assert (found["headrace_requests_running"], found["headrace_requests_waiting"]) == (4, 2)


def test_an_attached_engine_is_read_at_each_scrape() -> None:
    metrics, engine = Metrics(MODEL), FakeEngine(state=EngineState.LOADING)
    metrics.attach_engine(engine)
    assert samples(metrics)["headrace_engine_ready"] == 0
    engine.state, engine.restarts, engine.last_seen_age = EngineState.READY, 2, 1.5
    engine.stats = EngineStats(running=7, steps=1, step_tokens=3)
    engine.info = ModelInfo(
        max_model_len=128,
        vocab_size=10,
        eos_token_ids=[1],
        num_blocks=64,
        block_size=16,
        max_num_seqs=4,
        dtype="float32",
        device="cpu",
        weight_bytes=1,
        kv_cache_bytes=1,
        load_seconds=0.1,
        kernels={},
    )
    for _ in range(2):  # a second scrape of the same state adds nothing
        found = samples(metrics)
        assert found["headrace_engine_ready"] == 1
        assert found["headrace_engine_restarts_total"] == 2
        assert found["headrace_engine_step_age_seconds"] == 1.5
        assert found["headrace_requests_running"] == 7
        assert found["headrace_iteration_tokens_count"] == 1
        assert found["headrace_queued_prompt_tokens"] == 500
        assert found["headrace_prefill_tokens_per_second"] == 1250
        assert found["headrace_decode_step_seconds"] == 0.02
        assert found["vllm:cache_config_info{block_size=16,num_gpu_blocks=64}"] == 1


def test_http_methods_are_bounded() -> None:
    metrics = Metrics(MODEL)
    for method in ("POST", "BREW", "STEEP"):
        metrics.observe_http("/v1/completions", method, 200, 0.0015)
    found = samples(metrics)
    label = "method={},route=/v1/completions,status=200"
    assert found[f"headrace_http_requests_total{{{label.format('POST')}}}"] == 1
    assert found[f"headrace_http_requests_total{{{label.format('OTHER')}}}"] == 2


def test_rejections_by_reason() -> None:
    metrics = Metrics(MODEL)
    metrics.observe_rejected("queue_full")
    assert samples(metrics)["headrace_requests_rejected_total{reason=queue_full}"] == 1


def test_model_info_is_replaced_not_added_to() -> None:
    metrics = Metrics(MODEL)
    metrics.set_model_info(version="1", digest="old")
    metrics.set_model_info(version="1", digest="new", dtype="bfloat16", device="cpu")
    infos = [k for k in samples(metrics) if k.startswith("headrace_model_info")]
    assert infos == [
        "headrace_model_info{device=cpu,digest=new,dtype=bfloat16,revision=,version=1}"
    ]


def test_aliases_show_the_same_numbers() -> None:
    metrics = Metrics(MODEL)
    metrics.track("r", 100.0).tokens(2, now=100.004)
    metrics.observe_request(make_record())
    metrics.observe_stats(EngineStats(running=1, kv_blocks_used=1, kv_blocks_total=4, steps=1))
    found = samples(metrics)
    compared = 0
    for family in FAMILIES:
        if family.vllm is None:
            continue
        ours, theirs = family.full_name, f"vllm:{family.vllm}"
        for key, value in found.items():
            name, brace, labels = key.partition("{")
            suffix = name.removeprefix(ours)
            if name.startswith(ours) and suffix in ("", "_bucket", "_sum", "_count"):
                assert found[theirs + suffix + brace + labels] == value
                compared += 1
    assert compared > 200


def test_latencies_of_a_few_milliseconds_fall_into_different_buckets() -> None:
    for family in FAMILIES:
        if family.name.endswith(("first_token_seconds", "latency_seconds", "queue_time_seconds")):
            below = [bound for bound in family.buckets if bound <= 0.1]
            assert len(below) >= 5, family.name
        assert list(family.buckets) == sorted(set(family.buckets)), family.name


def test_two_instances_share_nothing() -> None:
    first, second = Metrics(MODEL), Metrics(MODEL)
    first.observe_request(make_record())
    assert samples(second)["headrace_requests_accepted_total"] == 0


def test_promtool_accepts_our_names() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    metrics = Metrics(MODEL)
    metrics.observe_request(make_record())
    metrics.observe_rejected("queue_full")
    metrics.observe_http("/v1/completions", "POST", 200, 0.1)
    metrics.set_model_info(version="1", digest="d")
    # promtool objects to every colon, so the aliases stay out.
    text = b"\n".join(line for line in metrics.render().splitlines() if b"vllm:" not in line)
    check = subprocess.run(
        [promtool, "check", "metrics"], input=text + b"\n", capture_output=True, timeout=20
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")


def test_importing_metrics_loads_neither_torch_nor_the_rest_of_the_server() -> None:
    code = (
        "import sys, headrace.observability.metrics, headrace.observability.logging;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'pynvml')"
        " or m.startswith('headrace.') and 'observability' not in m and m != 'headrace.errors'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"
