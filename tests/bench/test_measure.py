"""The formulas, on recorded event times, and the texts made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.measure import Spread, Trace, summarize
from headrace.bench.report import Report


def make_trace(
    scheduled: float, sent: float, chunks: list[float], tokens: int, prompt: int = 10
) -> Trace:
    return Trace(
        requested_tokens=tokens,
        prompt_len=prompt,
        scheduled=scheduled,
        sent=sent,
        chunk_times=chunks,
        text_chunks=len(chunks),
        prompt_tokens=prompt,
        completion_tokens=tokens,
        finish_reason="length",
    )


def make_failed() -> Trace:
    return Trace(requested_tokens=5, scheduled=0.1, sent=0.1, chunk_times=[0.2], error="HTTP 500")


TRACES = [
    # TTFT 100 ms, gaps 50 and 150 ms, E2EL 300 ms, TPOT 200/3 ms: the last event held two tokens.
    make_trace(1.0, 1.02, [1.1, 1.15, 1.3], tokens=4),
    # One token: no TPOT, no gap. TTFT = E2EL = 400 ms.
    make_trace(1.5, 1.5, [1.9], tokens=1, prompt=20),
    make_failed(),
]


def test_every_figure_of_a_small_run() -> None:
    summary = summarize(TRACES, 2.0, percentiles=(50.0, 99.0), goodput={"ttft": 100.0 + 1e-6})
    assert (summary.completed, summary.failed) == (2, 1)
    assert (summary.total_input, summary.total_output) == (30, 5)
    assert summary.request_throughput == 1.0
    assert summary.output_throughput == 2.5
    assert summary.total_token_throughput == 17.5
    assert summary.request_goodput == 0.5
    ttft, tpot, itl, e2el = (summary.latencies[name] for name in ("ttft", "tpot", "itl", "e2el"))
    assert ttft.mean == pytest.approx(250)
    assert ttft.std == pytest.approx(150)  # of the population
    assert ttft.percentiles[99.0] == pytest.approx(100 + 0.99 * 300)  # linear interpolation
    assert tpot.mean == tpot.median == pytest.approx(200 / 3)
    assert itl.mean == pytest.approx(100)
    assert e2el.mean == pytest.approx(350)


def test_latency_from_the_send_leaves_out_the_lag() -> None:
    summary = summarize(TRACES, 2.0, origin="sent")
    assert summary.latencies["ttft"].mean == pytest.approx((80 + 400) / 2)
    assert summary.latencies["tpot"].mean == pytest.approx(200 / 3)  # has no origin


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"ttft": 400.001}, 2),
        ({"ttft": 99.0}, 0),
        ({"tpot": 67.0}, 2),  # a request of one token keeps any TPOT
        ({"tpot": 66.0}, 1),
        ({"ttft": 400.001, "e2el": 300.001}, 1),
        ({"ttft": 399.0, "e2el": 400.001, "tpot": 66.0}, 0),
    ],
)
def test_goodput_needs_all_objectives(limits: dict[str, float], kept: int) -> None:
    assert summarize(TRACES, 1.0, goodput=limits).request_goodput == kept


def test_objectives_are_inclusive() -> None:
    trace = make_trace(1.0, 1.0, [1.25, 1.5], tokens=2)
    assert summarize([trace], 1.0, goodput={"ttft": 250, "tpot": 250, "e2el": 500}).request_goodput


def test_peaks_are_of_whole_seconds_after_the_first_send() -> None:
    traces = [
        make_trace(10.4, 10.5, [10.6, 11.4, 11.6], tokens=3),  # seconds 0, 0, 1
        make_trace(11.0, 11.4, [12.5, 12.6], tokens=2),  # alive in 0..2, tokens in 2, 2
        make_trace(12.0, 12.6, [12.7], tokens=1),  # second 2
    ]
    summary = summarize(traces, 3.0)
    assert summary.peak_output_throughput == 3
    assert summary.peak_concurrent_requests == 2


def test_a_run_in_which_all_failed_is_zero_not_nan() -> None:
    summary = summarize([make_failed()], 1.0, goodput={"ttft": 1})
    assert (summary.completed, summary.failed, summary.request_goodput) == (0, 1, 0)
    assert summary.latencies["ttft"] == Spread(0, 0, 0, {99.0: 0})
    assert summary.peak_output_throughput == 0


def test_without_usage_events_with_text_stand_for_tokens() -> None:
    trace = make_trace(0.0, 0.0, [0.1, 0.2, 0.3], tokens=3)
    trace.completion_tokens = trace.prompt_tokens = None
    trace.text_chunks = 2
    assert (trace.output_len, trace.input_len) == (2, 10)
    assert trace.tpot == pytest.approx(0.2)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 5), min_size=2, max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_parts_of_a_latency_add_up(gaps: list[float], lag: float, wait: float) -> None:
    times = list(lag + wait + np.cumsum(gaps))
    trace = make_trace(0.0, lag, times, tokens=len(times))
    tpot = trace.tpot
    assert tpot is not None
    assert trace.latency("scheduled") == pytest.approx(trace.ttft("scheduled") + sum(trace.itls))
    assert tpot * (len(times) - 1) == pytest.approx(sum(trace.itls))
    assert trace.latency("scheduled") - trace.latency("sent") == pytest.approx(lag)


def make_report(**changes: object) -> Report:
    fields: dict[str, object] = {
        "traces": TRACES,
        "summary": summarize(TRACES, 2.0),
        "percentiles": (99.0,),
        "shown_metrics": ("ttft", "tpot", "itl"),
        "request_rate": math.inf,
        "max_concurrency": None,
        "server_ttft_ms": None,
        "cached_tokens": None,
    }
    return Report(**fields | changes)  # type: ignore[arg-type]


def test_the_table_is_the_fields_table() -> None:
    expected = """\
============ Serving Benchmark Result ============
Successful requests:                     2         |
Failed requests:                         1         |
Benchmark duration (s):                  2.00      |
Total input tokens:                      30        |
Total generated tokens:                  5         |
Request throughput (req/s):              1.00      |
Output token throughput (tok/s):         2.50      |
Peak output token throughput (tok/s):    4.00      |
Peak concurrent requests:                2.00      |
Total token throughput (tok/s):          17.50     |
---------------Time to First Token----------------
Mean TTFT (ms):                          250.00    |
Median TTFT (ms):                        250.00    |
P99 TTFT (ms):                           397.00    |
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          66.67     |
Median TPOT (ms):                        66.67     |
P99 TPOT (ms):                           66.67     |
---------------Inter-token Latency----------------
Mean ITL (ms):                           100.00    |
Median ITL (ms):                         100.00    |
P99 ITL (ms):                            149.00    |
--------Send Lag (after scheduled arrival)--------
Median send lag (ms):                    0.00      |
P99 send lag (ms):                       19.60     |
Max send lag (ms):                       20.00     |
=================================================="""
    assert make_report().table() == expected.replace("|", "")


def test_optional_rows_stand_where_the_field_has_them() -> None:
    report = make_report(
        summary=summarize(TRACES, 2.0, percentiles=(50.0, 99.9), goodput={"ttft": 150}),
        shown_metrics=("e2el", "ttft"),
        request_rate=4.0,
        max_concurrency=8,
        server_ttft_ms=12.345,
        cached_tokens=64.0,
    )
    labels = [line.partition(":")[0] for line in report.table().splitlines()]
    assert labels[1:5] == [
        "Successful requests",
        "Failed requests",
        "Maximum request concurrency",
        "Request rate configured (RPS)",
    ]
    assert labels[labels.index("Request throughput (req/s)") + 1] == "Request goodput (req/s)"
    assert [label for label in labels if label.startswith("P")] == [
        "Peak output token throughput (tok/s)",
        "Peak concurrent requests",
        "P50 TTFT (ms)",
        "P99.9 TTFT (ms)",
        "P50 E2EL (ms)",
        "P99.9 E2EL (ms)",
        "P99 send lag (ms)",
        "Prompt tokens cached",
    ]
    assert "Mean TTFT (ms):                          12.35 " in report.table()  # the server's


def test_json_has_the_fields_keys_and_ours() -> None:
    content = make_report().json(detailed=False)
    for key in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{s}_{key}_ms" for s in ("mean", "median", "std", "p99")} <= content.keys()
    assert content["request_rate"] == "inf"
    assert content["mean_ttft_ms"] == pytest.approx(250)
    assert content["from_send"]["mean_ttft_ms"] == pytest.approx(240)
    assert content["send_lag_ms"]["max"] == pytest.approx(20)
    assert content["first_error"] == "HTTP 500"
    assert "ttfts" not in content


def test_detailed_json_has_one_entry_per_request() -> None:
    content = make_report().json(detailed=True)
    names = (
        *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "send_lags"),
        *("generated_texts", "errors"),
    )
    assert all(len(content[name]) == len(TRACES) for name in names)
    assert content["ttfts"][:2] == pytest.approx([0.1, 0.4])
    assert content["errors"] == ["", "", "HTTP 500"]
