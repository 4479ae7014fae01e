"""The front door: answers what is its own, hands the rest to replicas, listens, drains.

Loads neither torch nor fastapi nor ray: it relays bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable

from headrace.errors import (
    AuthenticationError,
    EngineError,
    HeadraceError,
    ModelNotFoundError,
    NotFoundError,
)
from headrace.observability.families import Family
from headrace.observability.logging import log_access
from headrace.route import listing
from headrace.route import targets as http_sd
from headrace.route.asked import OPEN_PATHS, Asked, Kind
from headrace.route.client_connection import BodyStream, ClientConnection
from headrace.route.config import RouteConfig, targets
from headrace.route.dispatch import Dispatch
from headrace.route.dns_source import DnsSource
from headrace.route.fleet import Fleet, Source
from headrace.route.guide import Guide, Whereabouts
from headrace.route.http_text import OwnAnswer, header, json_answer
from headrace.route.metrics import STATES, DoorMetrics
from headrace.route.policy import Policy
from headrace.route.relay import Answer
from headrace.route.shadow import FAMILIES as SHADOW_FAMILIES
from headrace.route.shadow import Mirror, Shadows

logger = logging.getLogger(__name__)

WaitForReplica = Callable[[str, Asked], Awaitable[bool]]
CLIENT_GONE = 499  # nginx's status for it; never sent
BACKLOG = 2048


async def _do_not_wait(application: str, asked: Asked) -> bool:
    return False


class Door:
    """One process's worth of front door."""

    def __init__(
        self,
        config: RouteConfig,
        *,
        sources: Iterable[Source] = (),
        metric_families: Iterable[Family] = (),
        metrics_folder: str = "",
    ) -> None:
        """`sources`: of addresses, besides those in `config`."""
        self.fleet = Fleet(config.api_key)
        self.metrics = DoorMetrics((*SHADOW_FAMILIES, *metric_families), metrics_folder)
        self.shadows = Shadows(self.fleet, self.metrics)
        self.metrics.before.append(self._count_replicas)
        self.guide = Guide()
        self.fleet.on_up.append(self.guide.restarted)
        self.whereabouts = Whereabouts()
        self.wait_for_replica: WaitForReplica = _do_not_wait
        """Asked when an application has no replica that is ready. True: look again."""
        self.draining = False
        self._sources = list(sources)
        self._connections: set[ClientConnection] = set()
        self._in_flight = 0
        self._server: asyncio.Server | None = None
        self._set_config(config)

    def _set_config(self, config: RouteConfig) -> None:
        self.config = config
        self.policy = Policy(config)
        self.max_body_bytes = int(config.max_body_bytes)
        self._key = (config.api_key or "").encode()

    # --- life -----------------------------------------------------------------------------------

    async def start(self, listener: socket.socket) -> None:
        """Accept connections at `listener`, and learn of replicas."""
        self._learn_static()
        for source in (DnsSource(self._services), *self._sources):
            self.fleet.start(source)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: ClientConnection(self), sock=listener, backlog=BACKLOG
        )

    def reconfigure(self, config: RouteConfig) -> None:
        """Other models, replicas, weights. What runs goes on; address, processes and key stay."""
        self._set_config(config)
        self._learn_static()

    def _learn_static(self) -> None:
        replicas = {
            it.name: it.backend.replicas for it in targets(self.config) if it.backend.replicas
        }
        self.fleet.update("configuration", replicas)

    def _services(self) -> dict[str, str]:
        return {it.name: it.backend.service for it in targets(self.config) if it.backend.service}

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return self._in_flight

    def drain(self) -> None:
        """Accept no more connections; those that are open are closed after the answers due."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close_if_idle()

    async def drained(self, timeout: float) -> bool:
        """Wait until nothing is in flight; False if something still is after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._in_flight or any(it.busy for it in self._connections):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        await asyncio.sleep(0)  # the last bytes leave
        return True

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cut() if connection.busy else connection.close_if_idle()
        await self.fleet.close()

    def opened(self, connection: ClientConnection) -> None:
        self._connections.add(connection)

    def closed(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)

    # --- one request ------------------------------------------------------------------------------

    async def serve(self, asked: Asked, answer: Answer, upload: BodyStream | None) -> None:
        """Answer one request, whatever happens."""
        began = time.perf_counter()
        self._in_flight += 1
        model = ""
        mirror: Mirror | None = None
        status = CLIENT_GONE
        try:
            self._authorize(asked)
            if asked.kind is Kind.OWN or asked.kind is Kind.NONE:
                answer.send_own(self._own_answer(asked))
            else:
                model = self._model_of(asked)
                applications = self.policy.applications(model, asked)
                mirror = self._mirror(model, asked, answer)
                await Dispatch(self, asked, answer, applications, upload).run()
            status = answer.status
        except HeadraceError as error:
            answer.fail(error)
            status = answer.status
        except asyncio.CancelledError:
            self.metrics.aborts.inc()
            raise
        except Exception:
            logger.exception("A bug")
            answer.fail(EngineError("The front door failed on this request; its log has more."))
            status = answer.status
        finally:
            if mirror is not None:
                mirror.leave()
            self._in_flight -= 1
            self._account(asked, answer, model, status, began)

    def _mirror(self, model: str, asked: Asked, answer: Answer) -> Mirror | None:
        shadow = self.policy.shadow(model, asked) if Shadows.takes(asked) else None
        if shadow is None:
            return None
        main = self.policy.main_application(model)
        return answer.watched_by(
            lambda client: self.shadows.mirror(asked, client, model=model, main=main, shadow=shadow)
        )

    def _account(self, asked: Asked, answer: Answer, model: str, status: int, began: float) -> None:
        if asked.path in OPEN_PATHS:
            return
        self.metrics.requests.labels(model, str(status)).inc()
        if answer.first_byte and asked.kind is Kind.MODEL:
            self.metrics.first_byte.labels(model).observe(answer.first_byte - began)
        method = asked.method.decode("latin-1")
        log_access(method, asked.path, status, time.perf_counter() - began)

    def _authorize(self, asked: Asked) -> None:
        """Raises AuthenticationError."""
        if not self._key or asked.path in OPEN_PATHS or asked.method == b"OPTIONS":
            return
        scheme, _, token = header(asked.headers, b"authorization").partition(b" ")
        given = [header(asked.headers, b"x-api-key")]
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        # Both are compared, so that the time tells nothing.
        if not any([hmac.compare_digest(one, self._key) for one in given]):
            raise AuthenticationError(
                "This server needs an API key it knows; send it as 'Authorization: Bearer KEY'."
            )

    def _model_of(self, asked: Asked) -> str:
        """The model that a request is for. Raises ModelNotFoundError."""
        name = asked.model
        if asked.kind is not Kind.MODEL or not isinstance(name, str) or not name:
            return self.config.default_model  # whose replica says what is wrong, if anything is
        model = self.policy.model(name)
        if model is None:
            raise ModelNotFoundError(listing.unknown_model(self.policy, name), param="model")
        return model

    def _own_answer(self, asked: Asked) -> OwnAnswer:
        """Raises NotFoundError."""
        path = asked.path
        if asked.kind is Kind.OWN and asked.method in (b"GET", b"HEAD"):
            if path == "/metrics":
                kind = b"text/plain; version=0.0.4; charset=utf-8"
                return OwnAnswer(200, self.metrics.render(), ((b"content-type", kind),))
            if path == http_sd.PATH:
                names = {self.policy.main_application(it): it for it in self.config.models}
                addresses = {
                    name: [it.url for it in replicas]
                    for name, replicas in self.fleet.applications.items()
                }
                sd_kind = ((b"content-type", http_sd.CONTENT_TYPE.encode()),)
                return OwnAnswer(200, http_sd.http_sd(addresses, names), sd_kind)
            if path == "/livez":
                return json_answer({"status": "alive"})
            if path in ("/readyz", "/health"):
                return listing.readiness(self.config, self.fleet, draining=self.draining)
            if path == "/v1/models":
                return json_answer(listing.models(self.config, self.policy, self.fleet))
            name = path.removeprefix("/v1/models/")
            return json_answer(listing.model(self.config, self.policy, self.fleet, name))
        method = asked.method.decode("latin-1")
        raise NotFoundError(
            f"There is nothing at {method} {path[:200]}; the API is below /v1.", code="not_found"
        )

    # --- figures ----------------------------------------------------------------------------------

    def _count_replicas(self) -> None:
        self.metrics.in_flight.set(self._in_flight)
        for model in self.config.models:
            replicas = self.fleet.applications.get(self.policy.main_application(model), ())
            for state in STATES:
                count = sum(it.state == state for it in replicas)
                self.metrics.replicas.labels(model, state).set(count)
