"""The record of a GPU run: what was measured where, written after every case."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""Figures by name, their units in the names: "us", "tok/s". "error" means that it failed."""


@dataclass(frozen=True)
class Case:
    """One thing to check or to measure."""

    name: str
    run: Callable[[], Result]


class Record:
    """{"machine": ..., "stages": {stage: {case: result}}} in a file."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path = path
        self._content = content

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any]) -> Record:
        """Go on with the file at `path` if it is of the same machine and sources."""
        content: dict[str, Any] = {"machine": machine, "stages": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before.get("machine") == machine:
                content = before
            else:
                kept = path.with_suffix(f".{int(path.stat().st_mtime)}.json")
                path.rename(kept)
                print(f"{path.name} is of another machine or other sources: now {kept.name}")
        return cls(path, content)

    def results(self, stage: str) -> dict[str, Result]:
        stages: dict[str, dict[str, Result]] = self._content["stages"]
        return stages.setdefault(stage, {})

    def run(
        self, stage: str, cases: Iterable[Case], *, only: str, again: bool, budget: float
    ) -> None:
        """Run what is missing, until `budget` seconds are over. A case that raises is a result."""
        end = time.monotonic() + budget
        found = self.results(stage)
        for case in cases:
            if only not in case.name or (case.name in found and not again):
                continue
            if time.monotonic() > end:
                print(f"{stage}: {budget:.0f} s are over; start again to go on at {case.name}")
                break
            start = time.monotonic()
            try:
                result = case.run()
            except Exception as error:  # the next case may still work
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
            found[case.name] = result
            print(f"{stage} {case.name} ({time.monotonic() - start:.1f} s): {_line(result)}")
            self._write()

    def failures(self, stages: Sequence[str]) -> list[str]:
        return [
            f"{stage} {name}"
            for stage in stages
            for name, result in self.results(stage).items()
            if "error" in result
        ]

    def table(self, stages: Sequence[str]) -> str:
        """What a person wants to see last."""
        lines = [f"{self._content['machine']['gpu']}; full figures in {self._path}"]
        for stage in stages:
            results = self.results(stage)
            failed = [name for name, result in results.items() if "error" in result]
            lines.append(f"{stage}: {len(results) - len(failed)} of {len(results)} cases passed")
            lines += [f"  FAILED {name}: {results[name]['error'][:150]}" for name in failed]
            if stage != "check":
                lines += [
                    f"  {name:44} {_line(result)}"
                    for name, result in results.items()
                    if name not in failed
                ]
        return "\n".join(lines)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(self._content, indent=1) + "\n")
        draft.replace(self._path)


def _line(result: Result) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in result.items()
    )
