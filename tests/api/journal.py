"""A door's half of a replay, as small as it can be: for tests of the replica's half."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

MARK = ": headrace "


@dataclass
class Kept:
    """What a door keeps of a stream; it knows no more of it than the seam says."""

    head: Any = None
    choices: dict[int, list[Any]] = field(default_factory=dict)
    events: int = 0
    forwarded: list[str] = field(default_factory=list)

    def forward(self, event: str) -> None:
        first, _, rest = event.partition("\n")
        if first.startswith(MARK):
            news = json.loads(first.removeprefix(MARK))
            self.head = news.get("head", self.head)
            for index, ids, finish_reason in news["c"]:
                entry = self.choices.setdefault(index, [index, [], None])
                entry[1] += ids
                entry[2] = finish_reason
            event = rest
        if event:
            self.forwarded.append(event)
            self.events += not event.startswith(":")

    @property
    def member(self) -> dict[str, Any]:
        return {"head": self.head, "c": list(self.choices.values()), "events": self.events}
