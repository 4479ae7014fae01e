"""Reads and checks request bodies: size while reading, content type, JSON, fields.

Every way in which a body can be wrong becomes a RequestError that names the field and the remedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from headrace.api.field_policy import HARMLESS, check_extra_fields
from headrace.api.resume import FIELD, is_journaled
from headrace.api.services import services_of
from headrace.api.streaming import ClientGoneError
from headrace.errors import InvalidRequestError, RequestTimeoutError, RequestTooLargeError

MAX_JSON_VALUES = 2**20
"""In one body: what is parsed on the event loop must not stop it for long."""

BODY_SECONDS = 300.0
"""From the first byte to the last. Streams of clients that send slowly hold a socket."""

Model = TypeVar("Model", bound=BaseModel)


async def receive(request: Request, kind: type[Model]) -> tuple[Model, list[str]]:
    """Read and check a body: see read_body and parse_body."""
    config = services_of(request).config
    raw = await read_body(request, config.max_body_bytes)
    doors_own = (FIELD,) if is_journaled(request.headers) else ()
    return parse_body(kind, raw, strict_fields=config.strict_fields, more=doors_own)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises RequestTooLargeError as soon as it is known to exceed `limit` bytes,
    InvalidRequestError for a content type other than JSON, RequestTimeoutError for one that takes
    too long, and ClientGoneError if it never ends."""
    content_type = request.headers.get("content-type", "application/json")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"The content type {media_type[:100]!r} is not taken; send JSON with the header "
            "'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    if announced_bytes(request) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimeoutError(
            f"The body did not end within {BODY_SECONDS:g} s; send it faster, or less of it."
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return b"".join(chunks)


def announced_bytes(request: Request) -> int:
    """Of the body, by its header; 0 where that says nothing."""
    announced = request.headers.get("content-length", "")
    is_number = announced.isascii() and announced.isdigit() and len(announced) < 20
    return int(announced) if is_number else 0


def parse_body(
    kind: type[Model], raw: bytes, *, strict_fields: bool, more: Sequence[str] = ()
) -> tuple[Model, list[str]]:
    """The typed body and the names of its unknown fields. Takes at most about a second, whatever
    the bytes are. `more`: fields that no model holds and somebody else reads.

    Raises InvalidRequestError or UnsupportedParameterError for the first thing that is wrong.
    """
    body = parse_json(kind, raw)
    ignored = check_extra_fields(
        body.model_extra,
        strict=strict_fields or bool(getattr(body, "strict_fields", None)),
        known=kind.model_fields,
        harmless=HARMLESS if not more else {**HARMLESS, **dict.fromkeys(more, "")},
    )
    return body, ignored


def parse_json(kind: type[Model], raw: bytes) -> Model:
    """The typed body, whatever other fields it has. As quick as parse_body, and raises the same."""
    # Counted in texts, too: a text with so many is longer than what a model takes.
    if len(raw) > MAX_JSON_VALUES and sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise RequestTooLargeError(
            f"The body holds more than {MAX_JSON_VALUES} values; split it over several requests."
        )
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_body(error) from None


def field_path(location: Sequence[str | int]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def invalid_body(error: ValidationError) -> InvalidRequestError:
    """The first thing that is wrong, by the name of its field."""
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return InvalidRequestError(
            f"The body is not valid JSON ({message.removeprefix('Invalid JSON: ')}).",
            code="invalid_json",
        )
    if kind in ("model_type", "dict_type") and not first["loc"]:
        return InvalidRequestError("The body must be a JSON object.", code="invalid_type")
    path = field_path(first["loc"])[:200]
    if kind == "missing":
        return InvalidRequestError(
            f"{path} is required.", param=path, code="missing_required_parameter"
        )
    if kind in ("too_short", "too_long") and (context := first.get("ctx")):
        limit = context["min_length" if kind == "too_short" else "max_length"]
        bound = "at least" if kind == "too_short" else "at most"
        return InvalidRequestError(f"{path} must have {bound} {limit} item(s).", param=path)
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    code = "invalid_type" if kind.endswith(("_type", "_parsing", "_from_float")) else None
    return InvalidRequestError(f"{path} {text}.", param=path, code=code)


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"The body is larger than {limit} bytes; shorten it, or start the server with a larger "
        "--max-body-bytes."
    )
