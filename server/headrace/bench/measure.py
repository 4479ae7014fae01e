"""From what was recorded of each request to the field's figures. Pure functions of event times.

The formulas are those of `vllm bench serve` 0.33, so that numbers can be compared; times are
time.perf_counter() seconds, results milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Origin = Literal["scheduled", "sent"]
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class Trace:
    """What the client saw of one request."""

    requested_tokens: int
    prompt_len: int | None = None
    """Tokens sent, where token ids were sent."""
    scheduled: float = 0.0
    sent: float = 0.0
    """Just before connecting."""
    chunk_times: list[float] = field(default_factory=list)
    """Arrivals of the events that have `choices`, empty text included."""
    text_chunks: int = 0
    """Those of them that have text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Both from `usage`."""
    finish_reason: str | None = None
    text: list[str] = field(default_factory=list)
    error: str = ""
    """Why it failed; empty if it did not."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def input_len(self) -> int:
        return self.prompt_tokens if self.prompt_tokens is not None else self.prompt_len or 0

    @property
    def output_len(self) -> int:
        """Of `usage`; of a server that sends none, the events with text stand for tokens."""
        return self.text_chunks if self.completion_tokens is None else self.completion_tokens

    def start(self, origin: Origin) -> float:
        return self.scheduled if origin == "scheduled" else self.sent

    def ttft(self, origin: Origin) -> float:
        return self.chunk_times[0] - self.start(origin)

    def latency(self, origin: Origin) -> float:
        return self.chunk_times[-1] - self.start(origin)

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is no second."""
        if self.output_len <= 1:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_len - 1)

    @property
    def itls(self) -> list[float]:
        times = self.chunk_times
        return [after - before for before, after in zip(times, times[1:], strict=False)]


@dataclass(frozen=True)
class Spread:
    """Mean, median, population deviation and percentiles (linear interpolation), milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
        """All zero for an empty sequence, as in the field's tables."""
        ms = np.asarray(seconds or [0.0]) * 1000
        points = np.percentile(ms, percentiles) if percentiles else []
        return cls(
            mean=float(ms.mean()),
            median=float(np.median(ms)),
            std=float(ms.std()),
            percentiles={p: float(value) for p, value in zip(percentiles, points, strict=True)},
        )


@dataclass(frozen=True)
class Summary:
    completed: int
    failed: int
    duration: float
    """Seconds from the start of the schedule to the end of the last response."""
    total_input: int
    total_output: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float | None
    """None when no objective was given."""
    peak_output_throughput: float
    peak_concurrent_requests: float
    latencies: dict[str, Spread]
    """By name in METRICS."""


def summarize(
    traces: Sequence[Trace],
    duration: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
    origin: Origin = "scheduled",
) -> Summary:
    """The figures of one run.

    duration: seconds. goodput: limits in milliseconds by `ttft`, `tpot` or `e2el`, inclusive; a
    request is good when it keeps all of them. origin: what TTFT and end-to-end latency count from.
    """
    good = [trace for trace in traces if trace.ok]
    total_input = sum(trace.input_len for trace in good)
    total_output = sum(trace.output_len for trace in good)
    seconds = {
        "ttft": [trace.ttft(origin) for trace in good],
        "tpot": [tpot for trace in good if (tpot := trace.tpot) is not None],
        "itl": [gap for trace in good for gap in trace.itls],
        "e2el": [trace.latency(origin) for trace in good],
    }
    peak_tokens, peak_requests = _peaks(good)
    kept = sum(_keeps(trace, goodput, origin) for trace in good) if goodput else 0
    return Summary(
        completed=len(good),
        failed=len(traces) - len(good),
        duration=duration,
        total_input=total_input,
        total_output=total_output,
        request_throughput=len(good) / duration,
        output_throughput=total_output / duration,
        total_token_throughput=(total_input + total_output) / duration,
        request_goodput=kept / duration if goodput else None,
        peak_output_throughput=peak_tokens,
        peak_concurrent_requests=peak_requests,
        latencies={name: Spread.of(values, percentiles) for name, values in seconds.items()},
    )


def _keeps(trace: Trace, limits: Mapping[str, float], origin: Origin) -> bool:
    ms = {
        "ttft": trace.ttft(origin) * 1000,
        "tpot": (trace.tpot or 0.0) * 1000,
        "e2el": trace.latency(origin) * 1000,
    }
    return all(ms[name] <= limit for name, limit in limits.items())


def _peaks(traces: Sequence[Trace]) -> tuple[float, float]:
    """Most events, and most requests alive, in one second, counted from the first send."""
    if not traces:
        return 0.0, 0.0
    start = min(trace.sent for trace in traces)
    bins = math.floor(max(trace.chunk_times[-1] for trace in traces) - start) + 1
    tokens, alive = np.zeros(bins), np.zeros(bins)
    for trace in traces:
        np.add.at(tokens, np.floor(np.asarray(trace.chunk_times) - start).astype(int), 1)
        alive[math.floor(trace.sent - start) : math.floor(trace.chunk_times[-1] - start) + 1] += 1
    return float(tokens.max()), float(alive.max())
