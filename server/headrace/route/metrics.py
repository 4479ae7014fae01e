"""What the door counts: one table of names, and the registry that Prometheus reads.

Several processes of one door write to files of prometheus_client's multiprocess mode; whichever
process is asked answers for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from headrace.observability.families import Family

_SECONDS = (
    *(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0),
)
_MODEL = ("model_name",)

FAMILIES: tuple[Family, ...] = (
    Family(
        "door_requests_total",
        "counter",
        "Answers to clients, by the model that was asked for (empty: none) and HTTP status.",
        ("model_name", "status"),
    ),
    Family(
        "door_replays_total",
        "counter",
        "Replicas that died of a request: it was sent again, its stream was resumed, or was lost.",
        ("outcome",),
    ),
    Family(
        "door_retries_total",
        "counter",
        "Tries that went on to another replica: refused connections, 429, 503.",
        ("reason",),
    ),
    Family(
        "door_time_to_first_byte_seconds",
        "histogram",
        "From a request's end to the first byte of its answer.",
        _MODEL,
        _SECONDS,
    ),
    Family("door_requests_in_flight", "gauge", "Requests that the door works on.", ()),
    Family(
        "door_client_aborts_total", "counter", "Clients that left before their answer's end.", ()
    ),
    Family(
        "door_replicas", "gauge", "Replicas that sources know, by state.", ("model_name", "state")
    ),
)
STATES = ("ready", "not ready", "draining", "down", "unknown")


class DoorMetrics:
    def __init__(self, more: Iterable[Family] = (), folder: str = "") -> None:
        """`more`: families of the door's other parts; `family(name)` finds them. `folder`: where
        the processes of one door write, which is also their PROMETHEUS_MULTIPROC_DIR."""
        self._folder = folder
        self._registry = CollectorRegistry()
        self._families = {
            family.name: _build(family, self._registry) for family in (*FAMILIES, *more)
        }
        self.before: list[Callable[[], None]] = []
        """Called before each exposition: sets gauges."""
        self.requests = self.family("door_requests_total")
        self.replays = self.family("door_replays_total")
        self.retries = self.family("door_retries_total")
        self.first_byte = self.family("door_time_to_first_byte_seconds")
        self.in_flight = self.family("door_requests_in_flight")
        self.aborts = self.family("door_client_aborts_total")
        self.replicas = self.family("door_replicas")
        for outcome in ("again", "resumed", "lost"):
            self.replays.labels(outcome)

    def family(self, name: str) -> Any:
        """The Counter, Gauge or Histogram of a family, by its name without the prefix."""
        return self._families[name]

    def render(self) -> bytes:
        """For GET /metrics, in Prometheus' text format."""
        for call in self.before:
            call()
        if not self._folder:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged, path=self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(merged)


def _build(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, text, labels = family.full_name, family.help, family.labels
    if family.kind == "counter":
        return Counter(name, text, labels, registry=registry)
    if family.kind == "gauge":
        # Of several processes: what each works on adds up; what all see is told once.
        mode = "livesum" if "in_flight" in name or "queued" in name else "livemax"
        return Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]
    return Histogram(name, text, labels, buckets=family.buckets, registry=registry)
