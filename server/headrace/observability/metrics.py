"""What the server counts: `Metrics` owns a registry of its own, fills the families of `families.py`
from the engine's records and stats, and renders them for Prometheus.

It must not know HTTP, the engine's insides or torch: records and stats are read structurally.
Everything here is called from the event loop of the API process, never from an engine step.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from headrace.observability.families import BY_NAME, FAMILIES, FINISH_REASONS, PREFIX, Family
from headrace.observability.observed import Engine, Record, Stats
from headrace.observability.resources import ResourceCollector

_HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_COMPLETED = frozenset(("stop", "length"))


class Metrics:
    """All metrics of one API process that serves one model.

    Every accepted request ends in one `observe_request(record)`, and that alone counts it in full
    but for inter-token latencies. Where its outputs are delivered, `meter = track(...)` and
    `meter.tokens(n)` per output add those, and make the counters move while it runs.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        model_name: str,
        *,
        api_pids: Callable[[], Collection[int]] = lambda: (),
        read_elsewhere: bool = False,
    ) -> None:
        """`api_pids`: children of this process that are API processes. `read_elsewhere`: a scrape
        does not come here, but reads the values where this process keeps them (merged.py)."""
        self.model_name = model_name
        self._read_elsewhere = read_elsewhere
        self.registry: CollectorRegistry = _Registry(self.flush)
        self._families = {family.name: _build(family, self.registry) for family in _OBSERVED}
        self.registry.register(ResourceCollector(api_pids))
        self._meters: dict[str, RequestMeter] = {}
        self._engine: Engine | None = None
        self._queued_elsewhere: Callable[[], int] = lambda: 0
        self._engine_counters = {
            field: (_Resetting(), self._counter(name)) for field, name in _ENGINE_COUNTERS.items()
        }
        self._restarts = _Resetting()
        self._bind_request_families()
        self._bind_engine_families()

    def _bind_request_families(self) -> None:
        self._accepted = self._counter("requests_accepted_total")
        self._finished = {r: self._counter("requests_finished_total", r) for r in FINISH_REASONS}
        self._prompt_tokens = self._counter("prompt_tokens_total")
        self._cached_tokens = self._counter("prompt_tokens_cached_total")
        self.generation_tokens = self._counter("generation_tokens_total")
        self.delivered_tokens = 0
        """Since the last scrape: what happens for every token is added up until somebody asks."""
        self.time_to_first_token = self._histogram("time_to_first_token_seconds")
        self.inter_token_latencies = _Tally(self._histogram("inter_token_latency_seconds"))
        self._per_output_token = self._histogram("request_time_per_output_token_seconds")
        self._queue_time = self._histogram("request_queue_time_seconds")
        self._prefill_time = self._histogram("request_prefill_time_seconds")
        self._decode_time = self._histogram("request_decode_time_seconds")
        self._inference_time = self._histogram("request_inference_time_seconds")
        self._e2e_latency = self._histogram("e2e_request_latency_seconds")
        self._request_prompt = self._histogram("request_prompt_tokens")
        self._request_generation = self._histogram("request_generation_tokens")
        self._request_max_tokens = self._histogram("request_max_tokens")
        self._request_preemptions = self._histogram("request_preemptions")

    def _bind_engine_families(self) -> None:
        self._running = self._gauge("requests_running")
        self._waiting = self._gauge("requests_waiting")
        self._kv_usage = self._gauge("kv_cache_usage_ratio")
        self._kv_used = self._gauge("kv_cache_blocks", "used")
        self._kv_free = self._gauge("kv_cache_blocks", "free")
        self._iteration_tokens = self._histogram("iteration_tokens")
        self._ready = self._gauge("engine_ready")
        self._queued_tokens = self._gauge("queued_prompt_tokens")
        self._prefill_speed = self._gauge("prefill_tokens_per_second")
        self._decode_step = self._gauge("decode_step_seconds")
        self._step_age = self._gauge("engine_step_age_seconds")
        self._engine_restarts = self._counter("engine_restarts_total")
        self.api_process_restarts = self._counter("api_process_restarts_total")

    # Requests

    def track(self, request_id: str, arrival_time: float) -> RequestMeter:
        """Follow a request that the engine has just accepted, until `observe_request`.

        arrival_time: time.monotonic() seconds.
        """
        meter = self._meters[request_id] = RequestMeter(self, arrival_time)
        self._accepted.inc()
        return meter

    def observe_request(self, record: Record) -> None:
        """Count a request at its end, whatever that was. Its meter, if it has one, is closed: what
        was not delivered (the client had gone) is counted here, so that token counters agree with
        the records."""
        meter = self._meters.pop(record.request_id, None)
        if meter is None:
            self._accepted.inc()
            meter = RequestMeter(self, record.arrival_time)
        meter.close(record)
        self._finished[str(record.finish_reason)].inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens)
        self._request_prompt.observe(record.prompt_tokens)
        self._request_generation.observe(record.output_tokens)
        self._request_preemptions.observe(record.preemptions)
        if record.max_tokens is not None:
            self._request_max_tokens.observe(record.max_tokens)
        self._observe_stages(record)
        if self._read_elsewhere:
            self.flush()

    def _observe_stages(self, record: Record) -> None:
        if record.scheduled_time:
            self._queue_time.observe(record.scheduled_time - record.arrival_time)
        if record.first_token_time:
            self._prefill_time.observe(record.first_token_time - record.scheduled_time)
        if record.finish_reason in _COMPLETED:
            self._inference_time.observe(record.finished_time - record.scheduled_time)
            self._e2e_latency.observe(record.finished_time - record.arrival_time)
        if record.finish_reason in _COMPLETED and record.first_token_time:
            decode = record.finished_time - record.first_token_time
            self._decode_time.observe(decode)
            if record.output_tokens > 1:
                self._per_output_token.observe(decode / (record.output_tokens - 1))

    def observe_rejected(self, reason: str) -> None:
        """Count a request that was refused before the engine. reason: the error's code, one of a
        fixed set (`queue_full`, `context_length_exceeded`, ...), never text from a client."""
        self._counter("requests_rejected_total", reason).inc()

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP exchange. route: the path's template, never the path itself."""
        method = method if method in _HTTP_METHODS else "OTHER"  # clients can invent methods
        self._counter("http_requests_total", route, method, str(status)).inc()
        self._histogram("http_request_duration_seconds", route, method).observe(seconds)

    # Engine

    def attach_engine(
        self, engine: Engine | None, queued_elsewhere: Callable[[], int] = lambda: 0
    ) -> None:
        """Read the engine's stats, age, state and restarts at every scrape. None: there is none
        just now. Counters go on from where those of the engine before ended. `queued_elsewhere`:
        prompt tokens that wait in other processes, which the engine's client here does not see."""
        self._queued_elsewhere = queued_elsewhere
        if engine is self._engine:
            return
        self.read_engine()
        self._engine = engine
        for seen in (self._restarts, *(seen for seen, _ in self._engine_counters.values())):
            seen.restart()
        if engine is None:
            busy = (self._running, self._waiting, self._queued_tokens)
            for gauge in (self._ready, *busy, self._kv_used, self._kv_usage):
                gauge.set(0)

    def observe_stats(self, stats: Stats) -> None:
        """Take over the engine's gauges and advance its counters, which may restart from zero.

        Called once per message from the engine, `iteration_tokens` sees every step; called only by
        a scrape (`attach_engine`), it samples the last one.
        """
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_used.set(stats.kv_blocks_used)
        self._kv_free.set(stats.kv_blocks_total - stats.kv_blocks_used)
        if stats.kv_blocks_total:
            self._kv_usage.set(stats.kv_blocks_used / stats.kv_blocks_total)
        for field, (seen, counter) in self._engine_counters.items():
            increase = seen.advance(getattr(stats, field))
            counter.inc(increase)
            if field == "steps" and increase and stats.step_tokens:
                self._iteration_tokens.observe(stats.step_tokens)

    def set_model_info(
        self, *, version: str, digest: str, revision: str = "", dtype: str = "", device: str = ""
    ) -> None:
        """Replace what `model_info` says is served. version: Headrace's; digest: the model's."""
        self._gauge_family("model_info").clear()
        self._gauge("model_info", version, digest, revision, dtype, device).set(1)

    def set_version(self, version: int) -> None:
        """The version of the folder that is served, 0 for none."""
        self._gauge("model_version").set(version)

    def observe_load(self, outcome: Literal["ok", "failed"]) -> None:
        """Count the end of a version's load."""
        self._counter("model_loads_total", outcome).inc()

    def read_engine(self) -> None:
        """Bring what is known of the engine up to date: a scrape is about to come."""
        if (engine := self._engine) is None:
            return
        self.observe_stats(engine.stats)
        self._ready.set(engine.state == "ready")
        work = engine.workload
        self._queued_tokens.set(work.queued_tokens + self._queued_elsewhere())
        self._prefill_speed.set(work.prefill_tokens_per_s)
        self._decode_step.set(work.decode_step_s)
        self._step_age.set(engine.last_seen_age)
        self._engine_restarts.inc(self._restarts.advance(engine.restarts))
        if (info := engine.info) is not None:
            self._gauge_family("kv_cache_config_info").clear()
            blocks = (str(info.block_size), str(info.num_blocks))
            self._gauge("kv_cache_config_info", *blocks).set(1)

    @property
    def totals(self) -> tuple[int, int]:
        """(requests accepted, tokens generated) since the start."""
        return _value(self._accepted), _value(self.generation_tokens) + self.delivered_tokens

    # Exposition

    def render(self) -> bytes:
        """The text exposition of everything, under our names and under vLLM's."""
        self.read_engine()
        return generate_latest(self.registry)

    def flush(self) -> None:
        """Count what was delivered since the last call; otherwise a scrape does."""
        self.generation_tokens.inc(self.delivered_tokens)
        self.delivered_tokens = 0
        self.inter_token_latencies.flush()

    def alias_as(self, prefix: str, **labels: str) -> None:
        """Also expose what vLLM has under its names with this prefix, and with more labels."""
        assert isinstance(self.registry, _Registry)
        self.registry.aliases[prefix] = labels

    def own_metrics(self) -> Iterator[Metric]:
        """What this process has observed, under our names."""
        assert isinstance(self.registry, _Registry)
        return self.registry.own_metrics()

    def _labels(self, name: str, values: tuple[str, ...]) -> tuple[str, ...]:
        return (self.model_name, *values) if "model_name" in BY_NAME[name].labels else values

    def _counter(self, name: str, *values: str) -> Counter:
        family = self._families[name]
        assert isinstance(family, Counter)
        return family.labels(*self._labels(name, values))

    def _histogram(self, name: str, *values: str) -> Histogram:
        family = self._families[name]
        assert isinstance(family, Histogram)
        return family.labels(*self._labels(name, values))

    def _gauge_family(self, name: str) -> Gauge:
        family = self._families[name]
        assert isinstance(family, Gauge)
        return family

    def _gauge(self, name: str, *values: str) -> Gauge:
        return self._gauge_family(name).labels(*self._labels(name, values))


class RequestMeter:
    """Follows the delivery of one request's tokens."""

    __slots__ = ("_closed", "_counted", "_delivered", "_last", "_metrics", "_ttft_known")

    def __init__(self, metrics: Metrics, arrival_time: float) -> None:
        self._metrics = metrics
        self._last = arrival_time
        self._delivered = self._counted = 0
        self._closed = self._ttft_known = False

    def tokens(self, count: int, now: float | None = None) -> None:
        """`count` tokens were delivered together at `now` (time.monotonic() seconds).

        The first output observes the time to first token; more tokens in it came without a gap.
        Tokens of a later output share the gap since the previous one equally, so that the
        histogram's sum stays the time that passed, and its count the tokens after the first.
        """
        if count <= 0:
            return
        now = time.monotonic() if now is None else now
        metrics, gap = self._metrics, now - self._last
        if self._delivered:
            metrics.inter_token_latencies.add(gap / count, count)
        else:
            if not self._ttft_known:
                metrics.time_to_first_token.observe(gap)
            if count > 1:
                metrics.inter_token_latencies.add(0.0, count - 1)
        self._delivered += count
        self._last = now
        # The last outputs are read after the engine's record came, which counted their tokens.
        if not self._closed:
            metrics.delivered_tokens += count
            self._counted += count

    def close(self, record: Record) -> None:
        """The engine is done with the request: count the tokens not yet seen here."""
        self._closed = True
        self._metrics.generation_tokens.inc(max(0, record.output_tokens - self._counted))
        if not self._delivered and record.first_token_time:
            ttft = record.first_token_time - record.arrival_time
            self._metrics.time_to_first_token.observe(ttft)
            self._ttft_known = True


def _value(counter: Counter) -> int:
    return int(next(iter(counter.collect())).samples[0].value)


class _Resetting:
    """Follows a counter of another process, which starts again from zero with that process."""

    def __init__(self) -> None:
        self._seen = 0

    def advance(self, value: int) -> int:
        """The increase since the last call."""
        increase = value - self._seen if value >= self._seen else value
        self._seen = value
        return increase

    def restart(self) -> None:
        """Follow another counter from now on, from its zero."""
        self._seen = 0


class _Tally:
    """Observations of a histogram that come for every token, added up until somebody asks: a tenth
    of the time of `observe`."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._bounds: list[float] = histogram._upper_bounds
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def add(self, value: float, count: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def flush(self) -> None:
        # The library adds one at a time; what it keeps is this.
        for bucket, count in zip(self._histogram._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(self._sum)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0


class _Registry(CollectorRegistry):
    """Leaves out the `_created` series: a line for every counter and histogram, used by few.

    `before`: called before anything is read."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self._before = before
        self.aliases: dict[str, dict[str, str]] = {"vllm:": {}}
        """Prefix -> labels besides ours."""

    def own_metrics(self) -> Iterator[Metric]:
        self._before()
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    def collect(self) -> Iterator[Metric]:
        metrics = list(self.own_metrics())
        yield from metrics
        for prefix, labels in self.aliases.items():
            yield from vllm_aliases(metrics, prefix, labels)


def vllm_aliases(
    metrics: Iterable[Metric], prefix: str = "vllm:", labels: Mapping[str, str] | None = None
) -> Iterator[Metric]:
    """Those families whose meaning is equal to one of vLLM's, with the same samples, under its
    name: dashboards, autoscalers and load tools made for vLLM read our numbers."""
    for metric in metrics:
        family = _BY_COLLECTED_NAME.get(metric.name)
        if family is None or family.vllm is None:
            continue
        theirs = prefix + family.vllm
        if metric.type == "counter":
            theirs = theirs.removesuffix("_total")
        renamed = Metric(theirs, f"Same as {family.full_name}.", metric.type)
        renamed.samples = [
            Sample(
                theirs + s.name.removeprefix(metric.name),
                {**s.labels, **labels} if labels else s.labels,
                s.value,
            )
            for s in metric.samples
        ]
        yield renamed


_BY_COLLECTED_NAME = {family.full_name.removesuffix("_total"): family for family in FAMILIES}
_ENGINE_COUNTERS = {
    "prefix_query_tokens": "prefix_cache_queries_total",
    "prefix_hit_tokens": "prefix_cache_hits_total",
    "preemptions": "preemptions_total",
    "oom_retries": "oom_retries_total",
    "steps": "engine_steps_total",
}
ENGINE_FAMILIES = frozenset(
    (*_ENGINE_COUNTERS.values(), "iteration_tokens", "engine_restarts_total")
    + ("api_process_restarts_total",)
)
"""Counters and histograms that whoever keeps the engine observes, not each API process."""
_OBSERVED = tuple(f for f in FAMILIES if not f.name.startswith(ResourceCollector.name_prefixes))


def _build(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = PREFIX + family.name
    if family.kind == "counter":
        return Counter(name, family.help, family.labels, registry=registry)
    if family.kind == "gauge":
        return Gauge(name, family.help, family.labels, registry=registry)
    return Histogram(name, family.help, family.labels, buckets=family.buckets, registry=registry)
