"""What to do about the versions of a model: a pure state machine, fed with looks at the folder and
with how loads and drains ended.

It promises what TensorFlow Serving does: a new version is loaded beside the old one, then takes its
place; a version that cannot be loaded leaves the old one as it is. Only where there is no room for
two does the old one go first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Content = tuple[tuple[str, int, int, int], ...]
"""Of a version: name, size, time and inode of each file."""
Seen = Mapping[int, Content | None]
"""By number; None: it still changes."""


class Phase(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It finishes the requests it has; it can be made ready again."""
    CLOSING = "closing"
    FAILED = "failed"
    """It stays so until its content changes."""


@dataclass(slots=True)
class Version:
    number: int
    phase: Phase
    content: Content
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Which of the versions that are there are wanted."""

    kind: str
    """latest, all or specific."""
    numbers: frozenset[int] = frozenset()

    def choose(self, there: Iterable[int]) -> set[int]:
        numbers = set(there)
        if self.kind == "latest":
            return {max(numbers)} if numbers else set()
        return numbers & self.numbers if self.kind == "specific" else numbers


class Do(enum.Enum):
    LOAD = "load"
    """Then call `loaded`, `no_room` or `failed`."""
    ABANDON = "abandon"
    """Stop loading, then call `unloaded`."""
    DRAIN = "drain"
    """When no request is left call `closing`, and `unloaded` at the end."""
    HURRY = "hurry"
    """As `DRAIN`, within a time: nothing else serves until it has ended."""
    READMIT = "readmit"
    """Do not drain it any more."""


Action = tuple[Do, int]


class Rollout:
    """`decide` says what to begin, and takes it as begun."""

    def __init__(self, policy: Policy) -> None:
        self.versions: dict[int, Version] = {}
        self._policy = policy
        self._seen: Seen = {}
        self._waiting: int | None = None
        """A version that is loaded when there is room."""

    # --- what has happened ------------------------------------------------------------------

    def look(self, seen: Seen) -> None:
        """The folder was looked at."""
        self._seen = seen
        for version in self._in(Phase.FAILED):
            content = seen.get(version.number, ())
            if content is not None and content != version.content:
                del self.versions[version.number]

    def loaded(self, number: int) -> None:
        self.versions[number].phase = Phase.READY

    def failed(self, number: int, reason: str) -> None:
        """It could not be loaded, or its engine is lost for good."""
        version = self.versions[number]
        version.phase, version.reason = Phase.FAILED, reason

    def no_room(self, number: int, reason: str) -> Action | None:
        """It was to be loaded and does not fit beside the others. What to begin about that; None:
        wait for what is going already, or (`failed`) there is nothing that could go."""
        replaced = [v.number for v in self._in(Phase.READY) if v.number not in self._wanted()]
        if not replaced and not self._going():
            self.failed(number, reason)
            return None
        del self.versions[number]
        self._waiting = number
        if self._going():
            return None
        self.versions[replaced[0]].phase = Phase.DRAINING
        return Do.HURRY, replaced[0]

    def closing(self, number: int) -> None:
        """Its last request has ended, and its engine is being ended."""
        self.versions[number].phase = Phase.CLOSING

    def unloaded(self, number: int) -> None:
        del self.versions[number]

    # --- what follows -----------------------------------------------------------------------

    def decide(self) -> list[Action]:
        wanted = self._wanted()
        if self._waiting not in wanted:
            self._waiting = None
        if not wanted:  # nothing could take the place of what serves
            return self._abandon(self._in(Phase.LOADING), but=set(self._seen))
        actions = self._abandon(self._in(Phase.LOADING), but=wanted)
        for version in self._in(Phase.DRAINING):
            if version.number in wanted:
                version.phase = Phase.READY
                actions.append((Do.READMIT, version.number))
        ready = self._in(Phase.READY)
        if any(version.number in wanted for version in ready):
            for version in ready:
                if version.number not in wanted:
                    version.phase = Phase.DRAINING
                    actions.append((Do.DRAIN, version.number))
        missing = wanted - self.versions.keys()
        blocked = self._waiting is not None and self._going()
        if missing and not blocked and not self._in(Phase.LOADING):
            number = max(missing)
            self._waiting = None
            content = self._seen[number]
            assert content is not None, "only what is whole is wanted"
            self.versions[number] = Version(number, Phase.LOADING, content)
            actions.append((Do.LOAD, number))
        return actions

    def serving(self) -> list[int]:
        """What takes requests, newest first."""
        return sorted((version.number for version in self._in(Phase.READY)), reverse=True)

    def unserved(self) -> list[tuple[int, Literal["loading", "draining", "failed"], str]]:
        """Every other version that is known, with its state and, if it failed, the reason."""
        found: list[tuple[int, Literal["loading", "draining", "failed"], str]] = []
        if self._waiting is not None:
            found.append((self._waiting, "loading", ""))
        for version in self.versions.values():
            match version.phase:
                case Phase.LOADING:
                    found.append((version.number, "loading", ""))
                case Phase.DRAINING | Phase.CLOSING:
                    found.append((version.number, "draining", ""))
                case Phase.FAILED:
                    found.append((version.number, "failed", version.reason))
        return sorted(found, reverse=True)

    def is_draining(self, number: int) -> bool:
        return any(version.number == number for version in self._in(Phase.DRAINING))

    def replaceable(self) -> list[int]:
        """Engines whose memory is free before long, or could be."""
        wanted = self._wanted()
        live = (*self._in(Phase.READY), *self._going())
        return [version.number for version in live if version.number not in wanted]

    def is_lost(self) -> bool:
        """Whether nothing serves, and nothing will unless the folder changes."""
        live = any(version.phase is not Phase.FAILED for version in self.versions.values())
        still_copied = self._policy.choose(n for n, content in self._seen.items() if not content)
        return not live and not self._wanted() and not still_copied

    def _wanted(self) -> set[int]:
        """Of the versions that are there and whole, and have not failed."""
        there = []
        for number, content in self._seen.items():
            version = self.versions.get(number)
            whole = content is not None if version is None else version.phase is not Phase.FAILED
            if whole:
                there.append(number)
        return self._policy.choose(there)

    def _in(self, phase: Phase) -> list[Version]:
        return [version for version in self.versions.values() if version.phase is phase]

    def _going(self) -> list[Version]:
        return [*self._in(Phase.DRAINING), *self._in(Phase.CLOSING)]

    def _abandon(self, loading: list[Version], but: set[int]) -> list[Action]:
        actions = []
        for version in loading:
            if version.number not in but:
                version.phase = Phase.CLOSING
                actions.append((Do.ABANDON, version.number))
        return actions
