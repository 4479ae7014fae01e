"""Where replicas are, as Ray knows it: the registry actor, or Serve's REST with direct ingress.

Ray ends a process that has lost the cluster's head for a minute. The door must go on, so what talks
to Ray is a child process, `python -m headrace.route.ray_source ADDRESS`, whose lines are read here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import secrets
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace import __version__
from headrace.config import ray_auth_token
from headrace.errors import ConfigError

logger = logging.getLogger(__name__)

OnChange = Callable[[Mapping[str, Sequence[str]]], None]

REGISTRY, NAMESPACE = "headrace-registry-v1", "headrace"
"""As deploy/registry.py names the actor: what its methods take and return is the seam."""
WATCH_SECONDS = 2.0
"""How long a look for changes takes; demand is told again, and counts as told, in between."""
POLL_SECONDS = 2.0
MAX_PAUSE = 10.0
"""Between attempts to reach a cluster that does not answer."""

Addresses = dict[str, tuple[str, ...]]


class RegistrySource:
    """Addresses from the registry actor of a cluster; a source of the door."""

    def __init__(self, address: str, *, command: Sequence[str] | None = None) -> None:
        """`address`: as ray.init takes it, such as auto, 10.0.0.1:6379 or ray://head:10001.
        `command`: what to run instead of the process that talks to Ray."""
        module = ("-P", "-m", "headrace.route.ray_source", address)
        self._command = command or (sys.executable, *module)
        self._known: Addresses = {}
        self._demand: Mapping[str, int] = {}
        self._process: asyncio.subprocess.Process | None = None

    def report_demand(self, queued: Mapping[str, int]) -> None:
        """What waits at this door now: application -> requests. Told to the registry until the
        next report; never raises."""
        self._demand = dict(queued)
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(json.dumps(self._demand).encode() + b"\n")

    async def run(self, on_change: OnChange) -> None:
        """Call `on_change` with application -> URLs whenever they differ; never returns. What is
        known stays known while Ray does not answer."""
        pause = 1.0
        while True:
            began = time.monotonic()
            reason = await self._follow(on_change)
            pause = 1.0 if time.monotonic() - began > MAX_PAUSE else min(pause * 2, MAX_PAUSE)
            logger.warning("Ray does not answer, replicas stay as they were: %s", reason)
            await asyncio.sleep(pause)

    async def _follow(self, on_change: OnChange) -> str:
        """Until the process ends; its last words."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=1 << 24
        )
        self._process = process
        assert process.stdout is not None and process.stderr is not None
        words = asyncio.create_task(_last_words(process.stderr))
        try:
            self.report_demand(self._demand)
            async for line in process.stdout:
                if line.startswith(b"{"):
                    self._take(json.loads(line), on_change)
            return await words
        finally:
            words.cancel()
            self._process = None
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()

    def _take(self, snapshot: Mapping[str, Any], on_change: OnChange) -> None:
        merged = merge(self._known, snapshot)
        for replica in snapshot["replicas"]:
            if replica["version"] != __version__ and replica["url"] not in _urls(self._known):
                logger.warning(
                    "Replica %s of %s is Headrace %s, this door is %s.",
                    replica["url"],
                    replica["application"],
                    replica["version"],
                    __version__,
                )
        if merged != self._known:
            self._known = merged
            on_change(merged)


async def _last_words(stream: asyncio.StreamReader) -> str:
    last = "it ended without a word"
    async for line in stream:
        last = line.decode(errors="replace").strip() or last
    return last


def _urls(addresses: Addresses) -> set[str]:
    return {url for urls in addresses.values() for url in urls}


def merge(known: Addresses, snapshot: Mapping[str, Any]) -> Addresses:
    """What is known after `snapshot`. A registry that has just begun misses replicas that have yet
    to register again: until its leases would have run out it adds and takes nothing away."""
    found: dict[str, set[str]] = {}
    for replica in snapshot["replicas"]:
        found.setdefault(replica["application"], set()).add(replica["url"])
    if snapshot["age_s"] < snapshot["lease_s"]:
        for application, urls in known.items():
            found.setdefault(application, set()).update(urls)
    return {application: tuple(sorted(found[application])) for application in sorted(found)}


# --- Serve's REST -----------------------------------------------------------------------------


class ServeRestSource:
    """Addresses from `GET {dashboard}/api/serve/applications/`; a source of the door.

    Only with RAY_SERVE_ENABLE_DIRECT_INGRESS=1 and without HAProxy: with it Serve lists proxies.
    """

    def __init__(self, dashboard: str) -> None:
        """`dashboard`: the URL of the cluster's dashboard, such as http://10.0.0.1:8265."""
        self._url = f"{dashboard.rstrip('/')}/api/serve/applications/"

    async def run(self, on_change: OnChange) -> None:
        """As RegistrySource.run."""
        known: Addresses | None = None
        complaint = ""
        while True:
            try:
                found = addresses_in(await asyncio.to_thread(self._get))
            except (OSError, ValueError, ConfigError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.warning("No addresses from %s, they stay: %s", self._url, complaint)
            else:
                complaint = ""
                if found != known:
                    known = found
                    on_change(found)
            await asyncio.sleep(POLL_SECONDS)

    def _get(self) -> Any:
        token = ray_auth_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self._url, headers=headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            return json.load(response)


def addresses_in(details: Mapping[str, Any]) -> Addresses:
    """Application -> URLs, from Serve's ServeInstanceDetails. Raises ConfigError where all targets
    are proxies: each stands for every replica of every application."""
    found: Addresses = {}
    proxies = {proxy["actor_name"] for proxy in details.get("proxies", {}).values()}
    groups = details.get("target_groups", [])
    for group in groups:
        if group["protocol"].upper() != "HTTP" or not group["app_name"]:
            continue
        # Proxies stand in for an application that has no replica.
        targets = [target for target in group["targets"] if target["name"] not in proxies]
        urls = sorted(f"http://{target['ip']}:{target['port']}" for target in targets)
        found[group["app_name"]] = tuple(urls)
    running = [a for a in details.get("applications", {}).values() if a["status"] == "RUNNING"]
    if groups and running and not found:
        raise ConfigError(
            "Serve lists its proxies, not replicas: without direct ingress, or with HAProxy. "
            "Give ray.address instead: replicas register there."
        )
    return found


def ray_source(reference: str) -> RegistrySource | ServeRestSource:
    """The source for a dashboard's URL (http, https) or a cluster's address (anything else)."""
    if reference.startswith(("http://", "https://")):
        return ServeRestSource(reference)
    return RegistrySource(reference)


# --- the process that talks to Ray ------------------------------------------------------------


def main() -> None:
    """Write a line of JSON for each snapshot, and read a line for each report of demand, until
    standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    address: str = parser.parse_args().address
    import ray

    ray.init(
        address=address,
        namespace=NAMESPACE,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
    )
    demand = _Demand()
    threading.Thread(target=demand.read, daemon=True).start()
    epoch, revision = "", -1
    while not demand.ended:
        try:
            registry: Any = ray.get_actor(REGISTRY, namespace=NAMESPACE)
            demand.registry = registry
            demand.tell()
            watching: Any = registry.watch.remote(epoch, revision, WATCH_SECONDS)
            snapshot: dict[str, Any] = ray.get(watching, timeout=3 * WATCH_SECONDS)
        except (ValueError, ray.exceptions.RayError):  # ValueError: there is no such actor, yet
            demand.registry = None
            time.sleep(1)
            continue
        epoch, revision = snapshot["epoch"], snapshot["revision"]
        # Without a change, too: what a young registry lacks is taken away once it is old.
        print(json.dumps(snapshot), flush=True)


class _Demand:
    """The last report that came on standard input."""

    def __init__(self) -> None:
        self.registry: Any = None
        self.ended = False
        self._door = secrets.token_hex(8)
        self._queued: dict[str, int] = {}

    def read(self) -> None:
        for line in sys.stdin:
            self._queued = json.loads(line)
            with contextlib.suppress(Exception):  # the next look at the registry tells it again
                self.tell()
        self.ended = True

    def tell(self) -> None:
        if self.registry is not None:
            self.registry.report_demand.remote(self._door, __version__, self._queued)


if __name__ == "__main__":
    main()
