"""Around every request: its id, its key, its time, its count, and the answer to a bug.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.api import playground, prefix_news
from headrace.api.error_response import error_response
from headrace.api.inner_request import INSIDE
from headrace.api.messages_errors import speaks_anthropic
from headrace.api.services import Services
from headrace.api.streaming import ClientGoneError, SlowClientError
from headrace.errors import AuthenticationError, EngineError
from headrace.observability.logging import log_access, request_id_var

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/version", "/metrics"}) | playground.PATHS
CLIENT_GONE = 499  # nginx's status for it; never sent

_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


class RequestMiddleware:
    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._keys = [key.encode() for key in services.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = self._services.open_requests.begin()
        try:
            if INSIDE in scope:
                await self._app(scope, receive, send)
            else:
                await self._answer(scope, receive, send)
        finally:
            self._services.open_requests.end(number)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, send)
        request_id_var.set(exchange.request_id)
        status = CLIENT_GONE
        try:
            if self._authorized(scope):
                if told := Headers(scope=scope).get(prefix_news.HEADER):
                    self._services.prefix_news.add(told)
                await self._app(scope, receive, exchange.send)
            else:
                await _unauthorized(scope["path"])(scope, receive, exchange.send)
            status = exchange.status
        except ClientGoneError:
            logger.debug("The client has gone")
        except SlowClientError as error:
            logger.warning("Dropped a client that does not read: %s", error)
        except Exception:
            # Uncompleted, a response that has begun ends with a broken connection.
            logger.exception("A bug")
            if not exchange.status:
                await _failed(exchange.request_id, scope["path"])(scope, receive, exchange.send)
            status = exchange.status
        finally:
            seconds = time.perf_counter() - exchange.began
            route = getattr(scope.get("route"), "path", "unmatched")
            self._services.metrics.observe_http(route, scope["method"], status, seconds)
            if scope["path"] not in OPEN_PATHS:
                log_access(scope["method"], scope["path"], status, seconds)

    def _authorized(self, scope: Scope) -> bool:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "")]  # Anthropic's
        if scheme.lower() == "bearer":
            given.append(token.strip())
        # Every key is compared, so that the time tells nothing.
        return any([hmac.compare_digest(one.encode(), key) for one in given for key in self._keys])


class _Exchange:
    """One request's id, time and status."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        self.began = time.perf_counter()
        self.status = 0
        self._send = send
        self._tells_anthropic = speaks_anthropic(scope["path"])

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self._tells_anthropic:
                headers["request-id"] = self.request_id
            elapsed = (time.perf_counter() - self.began) * 1000
            headers["openai-processing-ms"] = str(round(elapsed))
        await self._send(message)


def _failed(request_id: str, path: str) -> ASGIApp:
    return error_response(
        EngineError(
            "The server failed on this request; its log has the reason under request id "
            f"{request_id}."
        ),
        path=path,
    )


def _unauthorized(path: str) -> ASGIApp:
    error = AuthenticationError(
        "This server needs an API key it knows; send it as 'Authorization: Bearer KEY'."
    )
    return error_response(error, {"www-authenticate": "Bearer"}, path=path)
