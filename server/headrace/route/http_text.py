"""HTTP/1.1 as bytes: heads that the door writes, headers that end at it, its own error answers."""

from __future__ import annotations

import http
import json
from collections.abc import Iterable, Sequence

from headrace.errors import (
    HeadraceError,
    OverloadedError,
    UnavailableError,
    error_body,
    http_status,
)

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""

JOURNAL = b"headrace-journal"
"""Of requests: the door can read a journal; of answers: there is one in this stream."""

HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
"""Of one connection (RFC 9110, 7.6.1): never relayed."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    for status in http.HTTPStatus
}
_ANTHROPIC = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error"}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def request_head(method: bytes, url: bytes, headers: Headers, length: int | None) -> bytes:
    """To a replica. `length`: of the body, None for chunks to come."""
    lines = [b"%b %b HTTP/1.1\r\n" % (method, url), header_lines(headers)]
    if length is None:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif length or method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: %d\r\n" % length)
    return b"".join((*lines, b"\r\n"))


def relayed(
    headers: Headers, *, without: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    """Those that go on to the other side."""
    listed = {
        name.strip().lower()
        for key, value in headers
        if key == b"connection"
        for name in value.split(b",")
    }
    ends = HOP_BY_HOP | listed | without
    return [header for header in headers if header[0] not in ends]


def header(headers: Headers, name: bytes) -> bytes:
    """The first of that name; empty if there is none."""
    return next((value for key, value in headers if key == name), b"")


class OwnAnswer:
    """An answer that the door makes itself."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self, status: int, body: bytes, headers: Headers = ((b"content-type", b"application/json"),)
    ) -> None:
        self.status, self.body, self.headers = status, body, headers


def json_answer(content: object, status: int = 200) -> OwnAnswer:
    return OwnAnswer(status, json.dumps(content, ensure_ascii=False).encode())


def error_answer(error: HeadraceError, path: str) -> OwnAnswer:
    """OpenAI's error body, or Anthropic's where the path is theirs."""
    status = http_status(error)
    answer = json_answer(_error_content(error, status, path), status)
    more: list[tuple[bytes, bytes]] = []
    if isinstance(error, OverloadedError | UnavailableError):
        more.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
    if status == 401:
        more.append((b"www-authenticate", b"Bearer"))
    answer.headers = (*answer.headers, *more)
    return answer


def error_event(error: HeadraceError, path: str) -> bytes:
    """The last event of a stream that cannot go on."""
    content = _error_content(error, http_status(error), path)
    named = b"event: error\n" if path.startswith(("/v1/messages", "/v1/responses")) else b""
    if path.startswith("/v1/responses"):
        inner = error_body(error)["error"]
        content = {"type": "error", **{key: inner[key] for key in ("code", "message", "param")}}
    return named + b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _error_content(error: HeadraceError, status: int, path: str) -> dict[str, object]:
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return error_body(error)
