"""How the figures of a run are shown: the field's standard table, and JSON with the field's keys.

Rows, labels and formats of the table are those of `vllm bench serve` 0.33, so that scripts that
read it read ours; what is only ours stands in sections of its own after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.measure import METRICS, Spread, Summary, Trace, summarize

_WIDTH = 50
_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(frozen=True)
class Report:
    """One finished run, ready to be shown."""

    traces: Sequence[Trace]
    summary: Summary
    percentiles: tuple[float, ...]
    shown_metrics: tuple[str, ...]
    request_rate: float
    max_concurrency: int | None
    server_ttft_ms: float | None
    cached_tokens: float | None
    """Prompt tokens of this run that the server's prefix cache held."""
    setup: dict[str, Any] = field(default_factory=dict)
    """What was run, under the field's JSON keys: model_id, endpoint_type, seed, ..."""
    server: dict[str, Any] = field(default_factory=dict)
    disagreements: Sequence[str] = ()

    @property
    def send_lag(self) -> Spread:
        return Spread.of([t.sent - t.scheduled for t in self.traces], (50.0, 99.0, 100.0))

    def table(self) -> str:
        s = self.summary
        lines = [_heading(" Serving Benchmark Result ", "=")]
        lines += [_row("Successful requests:", s.completed), _row("Failed requests:", s.failed)]
        if self.max_concurrency is not None:
            lines.append(_row("Maximum request concurrency:", self.max_concurrency))
        if self.request_rate != float("inf"):
            lines.append(_row("Request rate configured (RPS):", self.request_rate))
        lines += [
            _row("Benchmark duration (s):", s.duration),
            _row("Total input tokens:", s.total_input),
            _row("Total generated tokens:", s.total_output),
            _row("Request throughput (req/s):", s.request_throughput),
        ]
        if s.request_goodput is not None:
            lines.append(_row("Request goodput (req/s):", s.request_goodput))
        lines += [
            _row("Output token throughput (tok/s):", s.output_throughput),
            _row("Peak output token throughput (tok/s):", s.peak_output_throughput),
            _row("Peak concurrent requests:", s.peak_concurrent_requests),
            _row("Total token throughput (tok/s):", s.total_token_throughput),
        ]
        for name in (metric for metric in METRICS if metric in self.shown_metrics):
            lines += self._latency_section(name)
        return "\n".join([*lines, *self._own_sections(), "=" * _WIDTH])

    def _latency_section(self, name: str) -> list[str]:
        title, short = _TITLES[name]
        spread = self.summary.latencies[name]
        return [
            _heading(title, "-"),
            _row(f"Mean {short} (ms):", spread.mean),
            _row(f"Median {short} (ms):", spread.median),
            *(_row(f"P{p:g} {short} (ms):", value) for p, value in spread.percentiles.items()),
        ]

    def _own_sections(self) -> list[str]:
        lag = self.send_lag.percentiles
        lines = [
            _heading("Send Lag (after scheduled arrival)", "-"),
            _row("Median send lag (ms):", lag[50.0]),
            _row("P99 send lag (ms):", lag[99.0]),
            _row("Max send lag (ms):", lag[100.0]),
        ]
        if self.server_ttft_ms is not None:
            lines += [
                _heading("Seen by the Server", "-"),
                _row("Mean TTFT (ms):", self.server_ttft_ms),
                _row("Prompt tokens cached:", round(self.cached_tokens or 0)),
            ]
        return lines

    def json(self, *, detailed: bool) -> dict[str, Any]:
        """The result as one JSON object. detailed: with the figures of each request."""
        s = self.summary
        rate = self.request_rate
        from_send = summarize(
            self.traces, s.duration, percentiles=self.percentiles, origin="sent"
        ).latencies
        result = {
            **self.setup,
            "request_rate": "inf" if rate == float("inf") else rate,
            "max_concurrency": self.max_concurrency,
            "duration": s.duration,
            "completed": s.completed,
            "failed": s.failed,
            "total_input_tokens": s.total_input,
            "total_output_tokens": s.total_output,
            "request_throughput": s.request_throughput,
            "request_goodput": s.request_goodput,
            "output_throughput": s.output_throughput,
            "total_token_throughput": s.total_token_throughput,
            "max_output_tokens_per_s": s.peak_output_throughput,
            "max_concurrent_requests": s.peak_concurrent_requests,
            **_latency_keys(s.latencies),
            "from_send": _latency_keys({name: from_send[name] for name in ("ttft", "e2el")}),
            "send_lag_ms": {
                f"p{p:g}" if p < 100 else "max": v for p, v in self.send_lag.percentiles.items()
            },
            "server": {
                **self.server,
                "mean_ttft_ms": self.server_ttft_ms,
                "cached_tokens": self.cached_tokens,
            },
            "disagreements": list(self.disagreements),
            "first_error": next((trace.error for trace in self.traces if trace.error), None),
        }
        return result | self._details() if detailed else result

    def _details(self) -> dict[str, Any]:
        """One entry per request, in order of arrival; seconds, from the scheduled arrival."""
        begin = min((trace.scheduled for trace in self.traces), default=0.0)
        seen = [(trace, bool(trace.chunk_times)) for trace in self.traces]
        return {
            "input_lens": [trace.input_len for trace in self.traces],
            "output_lens": [trace.output_len for trace in self.traces],
            "ttfts": [trace.ttft("scheduled") if any_ else 0.0 for trace, any_ in seen],
            "itls": [trace.itls for trace in self.traces],
            "latencies": [trace.latency("scheduled") if any_ else 0.0 for trace, any_ in seen],
            "start_times": [trace.scheduled - begin for trace in self.traces],
            "send_lags": [trace.sent - trace.scheduled for trace in self.traces],
            "generated_texts": ["".join(trace.text) for trace in self.traces],
            "errors": [trace.error for trace in self.traces],
        }


def _latency_keys(latencies: dict[str, Spread]) -> dict[str, float]:
    keys: dict[str, float] = {}
    for name, spread in latencies.items():
        keys[f"mean_{name}_ms"] = spread.mean
        keys[f"median_{name}_ms"] = spread.median
        keys[f"std_{name}_ms"] = spread.std
        keys |= {f"p{p:g}_{name}_ms": value for p, value in spread.percentiles.items()}
    return keys


def _row(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def _heading(title: str, rule: str) -> str:
    return f"{title:{rule}^{_WIDTH}}"
