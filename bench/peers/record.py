"""What was measured, and how it is shown: a Markdown table, JSON, and a picture."""

from __future__ import annotations

import importlib.util
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "headrace"
LOWER_IS_BETTER = (" ms", " s")
PLOT_REMEDY = (
    "the picture needs matplotlib: pip install -c constraints.txt 'headrace[peers]', or --no-plot"
)


@dataclass
class Measures:
    """The figures of one model file: rows in order, and what each contender had in each round."""

    model: str
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """[row][contender][round]; a round in which it failed is not there."""
    limits: dict[str, float] = field(default_factory=dict)
    """Of a row, by the ceilings of the same run."""

    def add(self, row: str, contender: str, round_number: int, value: float) -> None:
        self.values.setdefault(row, {}).setdefault(contender, {})[round_number] = value

    def median(self, row: str, contender: str) -> float | None:
        found = self.values.get(row, {}).get(contender, {})
        return statistics.median(found.values()) if found else None

    def ratio(self, row: str, contender: str) -> float | None:
        """How many times better ours is: the median over rounds of the ratio within a round, so
        that what the machine did in other rounds does not count. More than 1: ours is faster."""
        ours = self.values.get(row, {}).get(OURS, {})
        theirs = self.values.get(row, {}).get(contender, {})
        ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
        if not ratios:
            return None
        ratio = statistics.median(ratios)
        return 1 / ratio if lower_is_better(row) else ratio

    def of_limit(self, row: str) -> float | None:
        ours, limit = self.median(row, OURS), self.limits.get(row)
        return ours / limit if ours is not None and limit else None

    def contenders(self) -> list[str]:
        """Those that have a figure, ours first."""
        names = {name for row in self.values.values() for name in row}
        return sorted(names, key=lambda name: (name != OURS, name))

    def table(self) -> str:
        """Markdown, its columns aligned. Rates are tok/s."""
        peers = [name for name in self.contenders() if name != OURS]
        header = [self.model, OURS, *(cell for name in peers for cell in (name, "ratio"))]
        rows = [[*header, "limit", "of limit"] if self.limits else header]
        for row in self.values:
            cells = [row, _number(self.median(row, OURS))]
            for name in peers:
                cells += [_number(self.median(row, name)), _number(self.ratio(row, name), "x")]
            if self.limits:
                share = self.of_limit(row)
                cells += [
                    _number(self.limits.get(row)),
                    "" if share is None else f"{share:.0%}",
                ]
            rows.append(cells)
        return markdown(rows)

    def json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "rows": [
                {
                    "name": row,
                    "limit": self.limits.get(row),
                    "contenders": {
                        name: {
                            "median": self.median(row, name),
                            **({} if name == OURS else {"ratio": self.ratio(row, name)}),
                            "rounds": {str(number): value for number, value in found.items()},
                        }
                        for name, found in by_contender.items()
                    },
                }
                for row, by_contender in self.values.items()
            ],
        }


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line, without where things lie on this machine."""
    told = [re.sub(r"(^|=)/.*", r"\1PATH", argument) for argument in arguments]
    return shlex.join(["python", "-m", module, *told])


def lower_is_better(row: str) -> bool:
    return row.endswith(LOWER_IS_BETTER)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header; the first column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}{unit}"


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(models: Sequence[Measures], path: Path, caption: str) -> None:
    """Bars of every rate, a panel for each model file; a line where the limit is. PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [measures for measures in models if measures.values]
    figure, panels = pyplot.subplots(len(models), figsize=(11, 4.2 * len(models)), squeeze=False)
    for panel, measures in zip(panels[:, 0], models, strict=True):
        _draw(panel, measures)
    figure.text(0.5, 0.005, caption, fontsize=9, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(panel: Any, measures: Measures) -> None:
    rows = [row for row in measures.values if not lower_is_better(row)]
    names = measures.contenders()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        points = [
            (index + (place - (len(names) - 1) / 2) * width, value)
            for index, row in enumerate(rows)
            if (value := measures.median(row, name)) is not None
        ]
        bars = panel.bar([x for x, _ in points], [y for _, y in points], width * 0.95, label=name)
        panel.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    limits = [
        (index, limit)
        for index, row in enumerate(rows)
        if (limit := measures.limits.get(row)) is not None
    ]
    if limits:
        xs, ys = zip(*limits, strict=True)
        panel.hlines(
            ys, [x - 0.42 for x in xs], [x + 0.42 for x in xs], "black", label="limit", lw=1
        )
    panel.set_yscale("log")
    panel.set_ylim(bottom=1)
    panel.set_ylabel("tokens per second")
    panel.set_xticks(range(len(rows)), rows)
    panel.set_title(measures.model)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
