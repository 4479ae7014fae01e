"""The metrics of a server with several API processes, put together by their parent.

What API processes observe (requests, HTTP) lies in files of theirs, in the format of
prometheus_client's multiprocess mode: a process that dies, however suddenly, leaves its counts.
What is observed of the engine and of processes is the parent's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from headrace.observability.families import FAMILIES, PREFIX
from headrace.observability.metrics import ENGINE_FAMILIES, Metrics, vllm_aliases

_KINDS = ("counter", "histogram")
_ENDED = "ended"
"""Stands in names of files for all processes that have ended."""


# prometheus_client's names: those of counters without their ending.
_FROM_FILES = frozenset(
    family.full_name.removesuffix("_total")
    for family in FAMILIES
    if family.kind in _KINDS and family.name not in ENGINE_FAMILIES
)


class MergedMetrics(Metrics):
    """Metrics of the parent, whose `render` is of all processes."""

    def __init__(
        self,
        model_name: str,
        folder: Path,
        api_pids: Callable[[], Collection[int]] = lambda: (),
    ) -> None:
        """`folder`: where the API processes have their files."""
        super().__init__(model_name, api_pids=api_pids)
        self._folder = folder

    def render(self) -> bytes:
        """Called from one process alone, all scrapes give the same."""
        self.read_engine()
        return generate_latest(self)  # it only asks it to collect

    def collect(self) -> Iterator[Metric]:
        files = [str(path) for kind in _KINDS for path in sorted(self._folder.glob(f"{kind}_*.db"))]
        observed = {metric.name: metric for metric in _merge(files)}
        metrics = []
        for metric in self.own_metrics():
            if metric.name in _FROM_FILES and metric.name in observed:
                metric.samples = observed[metric.name].samples
            metrics.append(metric)
        yield from metrics
        yield from vllm_aliases(metrics)

    def retire(self, pid: int) -> None:
        """An API process has ended: what it counted is kept, and requests that ended with it count
        as aborted."""
        for kind in _KINDS:
            path = self._folder / f"{kind}_{pid}.db"
            if not path.exists():
                continue
            kept: Any = MmapedDict(str(self._folder / f"{kind}_{_ENDED}.db"))  # type: ignore[no-untyped-call]
            for key, value in _with_lost(_read(path)):
                kept.write_value(key, kept.read_value(key)[0] + value, 0.0)
            kept.close()
            path.unlink()
        for path in self._folder.glob(f"gauge_*_{pid}.db"):
            path.unlink()


def _read(path: Path) -> dict[str, float]:
    values = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    return {key: value for key, value, _, _ in values}


def _with_lost(values: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The values of a process that has ended; its requests have ended, too."""
    accepted = finished = 0.0
    aborted = None
    for key, value in values.items():
        _, name, labels, _ = json.loads(key)
        if name == PREFIX + "requests_accepted_total":
            accepted += value
        elif name == PREFIX + "requests_finished_total":
            finished += value
            if labels["finished_reason"] == "abort":
                aborted = key
    for key, value in values.items():
        yield key, value + (accepted - finished if key == aborted else 0.0)


def _merge(files: list[str]) -> Iterable[Metric]:
    merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return merged
