"""Selectors and the usual queries in PromQL, for families that exist only: a name, a label or a
kind that the tables do not have is an error when files are generated, not an empty panel.

It must not know panels or alerts.
"""

from __future__ import annotations

from typing import Literal

from headrace.observability.families import FAMILIES, Family
from headrace.route import metrics, waking

BY_NAME = {it.name: it for table in (FAMILIES, metrics.FAMILIES, waking.FAMILIES) for it in table}
"""What replicas and the door expose."""

TARGET_LABELS = frozenset(("job", "instance", "application", "replica", "model"))
"""Labels that a scrape adds: Prometheus the first two, the list of targets the others."""

Kind = Literal["counter", "gauge", "histogram"]


def family(name: str, *kinds: Kind) -> Family:
    """The family of that name (without prefix). Raises KeyError if there is none, ValueError if its
    kind is not among `kinds`."""
    found = BY_NAME[name]
    if kinds and found.kind not in kinds:
        raise ValueError(f"{name} is a {found.kind}, not a {' or '.join(kinds)}.")
    return found


def series(name: str, *matchers: str, suffix: str = "") -> str:
    """A selector: `headrace_NAME{matchers}`.

    matchers: such as `status=~"5.."`; the label must be one that the family or a scrape has.
    suffix: `_bucket`, `_sum` or `_count` of a histogram.
    """
    found = family(name)
    if bool(suffix) != (found.kind == "histogram"):
        raise ValueError(f"{name} is a {found.kind}; its suffix cannot be {suffix!r}.")
    known = {*found.labels, *TARGET_LABELS, *(("le",) if suffix == "_bucket" else ())}
    for matcher in matchers:
        label = matcher.partition("=")[0].rstrip("!~")
        if label not in known:
            raise ValueError(f"{name} has no label {label!r}.")
    return (
        f"{found.full_name}{suffix}{{{', '.join(matchers)}}}"
        if matchers
        else (found.full_name + suffix)
    )


class Selection:
    """Queries over the series that some matchers select, over one window.

    Matchers whose label a family lacks are left out for that family: HTTP is not counted by model.
    So are those that name a replica for families of the door, which is none.
    """

    def __init__(self, matchers: tuple[str, ...], window: str) -> None:
        self._matchers = matchers
        self._window = window

    def select(self, name: str, *matchers: str, suffix: str = "") -> str:
        scraped = () if name.startswith("door_") else TARGET_LABELS
        labels = {*family(name).labels, *scraped}
        general = (m for m in self._matchers if m.partition("=")[0].rstrip("!~") in labels)
        return series(name, *general, *matchers, suffix=suffix)

    def rate(self, name: str, *matchers: str, by: str = "", suffix: str = "") -> str:
        """Per second, of a counter or of a histogram's `_sum` or `_count`, summed."""
        family(name, "counter", "histogram")
        selected = self.select(name, *matchers, suffix=suffix)
        return f"sum{_by(by)} (rate({selected}[{self._window}]))"

    def increase(self, name: str, *matchers: str, by: str = "") -> str:
        family(name, "counter")
        return f"sum{_by(by)} (increase({self.select(name, *matchers)}[{self._window}]))"

    def gauge(self, name: str, *matchers: str, by: str = "", combine: str = "sum") -> str:
        family(name, "gauge")
        return f"{combine}{_by(by)} ({self.select(name, *matchers)})"

    def quantile(self, quantile: float, name: str) -> str:
        """Of all observations of a histogram."""
        return f"histogram_quantile({quantile}, {self.rate(name, by='le', suffix='_bucket')})"

    def mean(self, name: str, by: str = "") -> str:
        """Of a histogram's observations."""
        total, count = (self.rate(name, by=by, suffix=s) for s in ("_sum", "_count"))
        return f"{total} / {count}"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
