"""Which replicas there are and where each listens: a named actor, its state, and a replica's entry.

Behind HAProxy Serve tells nobody where replicas are, and no public name tells a replica its port.
So each opens a port of its own and keeps an entry here for as long as it lives. Doors and
Prometheus read the entries; doors report what waits for applications without replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger(__name__)

NAME, NAMESPACE = "headrace-registry-v1", "headrace"
"""Of the actor. The number is that of what its methods take and return: it outlives rollouts."""
LEASE_SECONDS = 10.0
"""An entry that is not renewed for so long belongs to a replica or a door that is gone."""
RENEW_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Registration:
    """One replica, as it describes itself. All of it is text, for readers of other versions."""

    application: str
    replica: str
    """Ray's id of it, unique."""
    url: str
    """Of its own HTTP port, such as http://10.0.0.3:31000: the API and /metrics."""
    node: str
    model: str
    version: str
    """Of Headrace."""


class Registry:
    """The state, without Ray. `clock`: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._epoch = secrets.token_hex(8)
        self._revision = 0
        self._replicas: dict[str, tuple[float, dict[str, str]]] = {}
        self._doors: dict[str, tuple[float, str, dict[str, int]]] = {}

    def register(self, entry: Mapping[str, str]) -> None:
        """Add or renew a Registration, as a mapping; good for LEASE_SECONDS."""
        known = self._replicas.get(entry["replica"])
        self._replicas[entry["replica"]] = (self._clock() + LEASE_SECONDS, dict(entry))
        if known is None or known[1] != entry:
            self._changed()

    def unregister(self, replica: str) -> None:
        """The replica takes no new requests from now on."""
        if self._replicas.pop(replica, None) is not None:
            self._changed()

    def report_demand(self, door: str, version: str, queued: Mapping[str, int]) -> None:
        """What waits at a door now: application -> requests. Also renews the door's own entry."""
        self._doors[door] = (self._clock() + LEASE_SECONDS, version, dict(queued))

    def demand(self) -> dict[str, int]:
        """Requests that wait at all doors, by application; only what is above 0."""
        self._expire()
        total: dict[str, int] = {}
        for _, _, queued in self._doors.values():
            for application, count in queued.items():
                if count > 0:
                    total[application] = total.get(application, 0) + count
        return total

    def doors(self) -> dict[str, str]:
        """Door -> its version of Headrace."""
        self._expire()
        return {door: version for door, (_, version, _) in self._doors.items()}

    def snapshot(self) -> dict[str, Any]:
        """`replicas`: Registrations as mappings, by replica id. `epoch` differs between lives of
        the actor, `revision` counts changes. Before `age_s` reaches `lease_s` replicas may be
        missing that have yet to register again."""
        self._expire()
        return {
            "epoch": self._epoch,
            "revision": self._revision,
            "age_s": self._clock() - self._began,
            "lease_s": LEASE_SECONDS,
            "replicas": [self._replicas[replica][1] for replica in sorted(self._replicas)],
        }

    def _expire(self) -> None:
        now = self._clock()
        for replica, (until, _) in list(self._replicas.items()):
            if until < now:
                self.unregister(replica)
        self._doors = {door: entry for door, entry in self._doors.items() if entry[0] >= now}

    def _changed(self) -> None:
        self._revision += 1


class RegistryActor(Registry):
    """The registry with callers that wait for a change. All methods run on one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._change = asyncio.Event()

    async def watch(self, epoch: str, revision: int, timeout: float) -> dict[str, Any]:
        """The next snapshot that is not the one named, or the same one after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            change, snapshot = self._change, self.snapshot()
            left = deadline - time.monotonic()
            if (snapshot["epoch"], snapshot["revision"]) != (epoch, revision) or left <= 0:
                return snapshot
            with contextlib.suppress(TimeoutError):  # leases end without a call
                await asyncio.wait_for(change.wait(), min(left, 1.0))

    def _changed(self) -> None:
        super()._changed()
        self._change.set()
        self._change = asyncio.Event()


def open_registry() -> Any:
    """The actor's handle; started if there is none. It outlives whoever starts it.

    Ray restarts it elsewhere when its node dies; it is empty then until replicas renew.
    """
    import ray

    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
    }
    return ray.remote(RegistryActor).options(**options).remote()


class Membership:
    """A replica's entry, renewed until it leaves."""

    def __init__(self, registration: Registration) -> None:
        """Needs the running event loop. Registering goes on in the background: a replica serves
        whether or not the registry can be had."""
        self._entry = asdict(registration)
        self._registry: Any = None
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        reported = False
        while True:
            try:
                if self._registry is None:
                    self._registry = await asyncio.to_thread(open_registry)
                await asyncio.wait_for(self._registry.register.remote(self._entry), LEASE_SECONDS)
                reported = False
            except Exception as error:  # Ray has many, and none may end the replica
                self._registry = None
                if not reported:
                    logger.warning("The registry of replicas cannot be had: %s", error)
                reported = True
            await asyncio.sleep(RENEW_SECONDS)

    async def leave(self) -> None:
        """Doors send nothing new after this, or after the lease if the registry is not there."""
        self._renewing.cancel()
        if self._registry is not None:
            with contextlib.suppress(Exception):  # the same
                await asyncio.wait_for(
                    self._registry.unregister.remote(self._entry["replica"]), RENEW_SECONDS
                )
