"""Requests that reach a replica at its own port: Ray does not see them, so its metrics lack them.

They are added under Ray's name in the replica's own exposition. Ray's dashboard for LLMs finds a
worker's deployment by that counter, and would show nothing of a replica that only doors use.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

NAME = "ray_serve_deployment_request_counter"
_TEXT = "Requests that came to the replica's own port, which Ray does not count."


class PastRay(Collector):
    """Counts them and collects the count; the labels are Ray's."""

    def __init__(self, *, application: str, deployment: str, replica: str, worker: str) -> None:
        self.port = 0
        """The replica's own, once it is known."""
        self.count = 0
        self._labels = {
            "application": application,
            "deployment": deployment,
            "replica": replica,
            "WorkerId": worker,
        }

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(NAME, _TEXT, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self.count)
        return (family,)


class CountingPastRay:
    """ASGI middleware: counts what asks the API there. Probes and polls are no requests."""

    def __init__(self, app: ASGIApp, counted: PastRay) -> None:
        self._app = app
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            _, port = scope.get("server") or ("", 0)
            self._counted.count += bool(port) and port == self._counted.port
        await self._app(scope, receive, send)
