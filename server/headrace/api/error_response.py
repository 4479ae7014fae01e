"""Errors as HTTP responses, in OpenAI's body; on routes of Anthropic's API in theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from headrace.api import messages_errors
from headrace.errors import (
    HeadraceError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    error_body,
    http_status,
)


def json_response(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def error_response(
    error: HeadraceError, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> Response:
    """`path`: of the request. `Retry-After` (whole seconds, rounded up) goes with errors that
    pass."""
    if messages_errors.speaks_anthropic(path):
        response = json_response(*messages_errors.messages_error(error))
    else:
        response = json_response(error_body(error), http_status(error))
    response.headers.update(headers or {})
    if isinstance(error, RequestTimeoutError):
        response.headers["connection"] = "close"  # what else comes is no request
    if isinstance(error, OverloadedError | UnavailableError):
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return response


async def on_headrace_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    return error_response(error, path=request.url.path)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals (unknown route, wrong method), in OpenAI's body."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        answer = RequestError(f"There is no route {route}; /docs lists them.", code="not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        answer = RequestError(f"{route} is not allowed; use {allowed}.", code="method_not_allowed")
    else:
        answer = RequestError(str(error.detail))
    body = error_body(answer)
    if messages_errors.speaks_anthropic(request.url.path):
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        body = messages_errors.error_body(kind, answer.message)
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response
