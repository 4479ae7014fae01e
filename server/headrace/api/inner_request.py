"""Requests that the server makes to its own application, without a connection.

They meet the same checks and get the same answers as clients' do, but for what surrounds those: no
key is asked for, and they are no HTTP requests in metrics and access log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from headrace.errors import EngineError, error_body
from headrace.observability.logging import request_id_var

logger = logging.getLogger(__name__)

INSIDE = "headrace.inside"
"""Marks the scopes of such requests; those of connections never hold it."""


@dataclass(slots=True)
class Answer:
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def post(app: ASGIApp, path: str, body: bytes, *, request_id: str) -> Answer:
    """POST `body`, JSON, to `path`. Cancelled, it aborts what the endpoint started."""
    request_id_var.set(request_id)
    scope: MutableMapping[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
        "state": {},
        INSIDE: True,
    }
    answer = Answer()
    parts: list[bytes] = []
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody disconnects
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        logger.exception("A bug")
        error = EngineError("The server failed on this request; its log has the reason.")
        return Answer(500, {}, msgspec.json.encode(error_body(error)))
    answer.body = b"".join(parts)
    return answer
