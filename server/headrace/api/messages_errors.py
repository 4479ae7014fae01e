"""Errors in Anthropic's body, for the routes of the Messages API.

https://platform.claude.com/docs/en/api/errors
"""

from __future__ import annotations

from typing import Any

from headrace.errors import (
    AuthenticationError,
    ContextLengthExceededError,
    HeadraceError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnavailableError,
)
from headrace.observability.logging import request_id_var

PATH = "/v1/messages"

# class -> (HTTP status, Anthropic's error type); the first match wins, subclasses first.
ERRORS: tuple[tuple[type[HeadraceError], int, str], ...] = (
    (AuthenticationError, 401, "authentication_error"),
    (ModelNotFoundError, 404, "not_found_error"),
    (NotFoundError, 404, "not_found_error"),
    (RequestTimeoutError, 408, "timeout_error"),
    (RequestTooLargeError, 413, "request_too_large"),
    (RequestError, 400, "invalid_request_error"),
    (OverloadedError, 529, "overloaded_error"),
    (UnavailableError, 503, "api_error"),
    (HeadraceError, 500, "api_error"),
)

# Clients that keep conversations at the server, as anthropic-python's tool runner does, read it and
# send the whole conversation instead.
_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": []}

# Chat's name of a field -> that of the Messages API, in messages about the former.
_THEIR_NAMES = (
    (".function.parameters", ".input_schema"),
    (".function.name", ".name"),
    (".function.strict", ".strict"),
    ("response_format.json_schema.schema", "output_config.format.schema"),
    ("response_format", "output_config.format"),
    ("thinking_token_budget", "thinking.budget_tokens"),
    ('"required"', '"any"'),
)


def speaks_anthropic(path: str) -> bool:
    """Whether answers at `path` are in Anthropic's shapes."""
    return path == PATH or path.startswith(PATH + "/")


def messages_error(error: HeadraceError) -> tuple[dict[str, Any], int]:
    """The body and the HTTP status code."""
    _, status, kind = next(row for row in ERRORS if isinstance(error, row[0]))
    message = error.message
    if isinstance(error, ContextLengthExceededError):
        message = f"prompt is too long: {message}"  # clients shorten it when they read that
    elif isinstance(error, RequestError):
        if error.param == "stop":
            message = message.replace("stop", "stop_sequences", 1)
        for ours, theirs in _THEIR_NAMES:
            message = message.replace(ours, theirs)
    body = error_body(kind, message)
    if isinstance(error, RequestError) and error.param == "thread":
        body["error"]["details"] = _NO_THREADS
    return body, status


def error_body(kind: str, message: str) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}, "request_id"}`."""
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id_var.get(),
    }
