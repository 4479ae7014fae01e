"""Every error a user can meet, and the one table that turns each into an HTTP answer.

HeadraceError
├── RequestError              the request is at fault; only that request fails
│   ├── InvalidRequestError           400  a field has a wrong type or value
│   ├── UnsupportedParameterError     400  a known field whose value we do not honour
│   ├── ContextLengthExceededError    400  prompt and output do not fit the context
│   ├── AuthenticationError           401  no key, or a wrong one
│   ├── ModelNotFoundError            404  no model of that name is served
│   ├── NotFoundError                 404  no file, batch or response of that id is kept
│   ├── RequestTimeoutError           408  the body did not arrive in time
│   └── RequestTooLargeError          413  the body is larger than the limit
├── OverloadedError           429  the queue is full: come back after `retry_after` seconds
├── UnavailableError          503  loading, draining, or the engine is gone
├── EngineError               500  a bug, or an engine that could not be restarted
├── ConfigError               a start-up option is wrong                  (never over HTTP)
│   └── StoreVersionError     the data folder is of another version       (never over HTTP)
└── CheckpointError           model files are missing, corrupt or unknown (never over HTTP)
"""

from __future__ import annotations

from typing import Any


class HeadraceError(Exception):
    """Base of all errors raised on purpose. `message` says what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(HeadraceError):
    """A request that cannot be served as it is. `param` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    pass


class UnsupportedParameterError(RequestError):
    pass


class ContextLengthExceededError(RequestError):
    pass


class AuthenticationError(RequestError):
    pass


class ModelNotFoundError(RequestError):
    pass


class NotFoundError(RequestError):
    pass


class RequestTimeoutError(RequestError):
    pass


class RequestTooLargeError(RequestError):
    pass


class OverloadedError(HeadraceError):
    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(HeadraceError):
    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(HeadraceError):
    pass


class ConfigError(HeadraceError):
    pass


class StoreVersionError(ConfigError):
    pass


class CheckpointError(HeadraceError):
    pass


# class -> (HTTP status, OpenAI error type, default code); the first match wins, subclasses first.
HTTP_ERRORS: tuple[tuple[type[HeadraceError], int, str, str | None], ...] = (
    (UnsupportedParameterError, 400, "invalid_request_error", "unsupported_parameter"),
    (ContextLengthExceededError, 400, "invalid_request_error", "context_length_exceeded"),
    (AuthenticationError, 401, "invalid_request_error", "invalid_api_key"),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (RequestTimeoutError, 408, "invalid_request_error", "request_timeout"),
    (RequestTooLargeError, 413, "invalid_request_error", "request_too_large"),
    (InvalidRequestError, 400, "invalid_request_error", "invalid_value"),
    (RequestError, 400, "invalid_request_error", None),
    (OverloadedError, 429, "rate_limit_error", "queue_full"),
    (UnavailableError, 503, "server_error", "unavailable"),
    (HeadraceError, 500, "server_error", "internal_error"),
)


def http_status(error: HeadraceError) -> int:
    """The HTTP status code that `error` is answered with."""
    return _row(error)[1]


def error_body(error: HeadraceError) -> dict[str, Any]:
    """OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`, with string codes."""
    _, _, kind, default_code = _row(error)
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) and error.code else default_code
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def _row(error: HeadraceError) -> tuple[type[HeadraceError], int, str, str | None]:
    return next(row for row in HTTP_ERRORS if isinstance(error, row[0]))
