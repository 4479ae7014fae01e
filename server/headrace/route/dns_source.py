"""Where replicas are, as DNS knows it: a name that has an address per replica.

That is what a headless Service of Kubernetes is; its name loses a pod's address when the pod is not
ready or is being deleted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence

from headrace.route.config import split_url

logger = logging.getLogger(__name__)

OnChange = Callable[[Mapping[str, Sequence[str]]], None]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

RESOLVE_SECONDS = 2.0
"""Between two questions; how old an answer may be is up to the resolvers."""


async def addresses_of(host: str, port: int) -> Sequence[str]:
    """Every IP address of a host. Raises OSError: socket.gaierror for a name without any."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class DnsSource:
    """Addresses of the services that the configuration names; a source of the door."""

    def __init__(
        self,
        services: Callable[[], Mapping[str, str]],
        *,
        resolve: Resolve = addresses_of,
        every: float = RESOLVE_SECONDS,
    ) -> None:
        """`services`: application -> http://HOST:PORT, asked each time, as it may change."""
        self._services = services
        self._resolve = resolve
        self._every = every
        self._known: dict[str, tuple[str, ...]] = {}

    async def run(self, on_change: OnChange) -> None:
        """Call `on_change` with application -> URLs whenever they differ; never returns. A name
        without an address has no replicas; while no resolver answers they stay as they were."""
        while True:
            services = self._services()
            answers = await asyncio.gather(
                *(self._ask(name, url) for name, url in services.items())
            )
            found = dict(zip(services, answers, strict=True))
            if found != self._known:
                self._known = found
                on_change(found)
            await asyncio.sleep(self._every)

    async def _ask(self, name: str, url: str) -> tuple[str, ...]:
        host, port = split_url(url, name)
        try:
            found = await self._resolve(host, port)
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
                return ()
            logger.warning("%s: %s; its replicas stay as they were", host, error.strerror)
            return self._known.get(name, ())
        urls = {f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}" for ip in found}
        return tuple(sorted(urls))
