"""Reads a multipart form with one file in it, which goes to the store as it arrives.

https://www.rfc-editor.org/rfc/rfc7578. No part of the body is held longer than it takes to write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from headrace.api.body import announced_bytes
from headrace.api.store import CHUNK_BYTES, ContentWriter
from headrace.api.streaming import ClientGoneError
from headrace.errors import InvalidRequestError, RequestTimeoutError, RequestTooLargeError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 16
MAX_FIELD_BYTES = 4096
PAUSE_SECONDS = 60.0
_FRAMING_BYTES = 64 * 1024
"""What the form may take beside the file."""


@dataclass(slots=True)
class Upload:
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None: there was no file."""
    size: int = 0
    """Bytes of the file."""


async def receive_upload(
    request: Request, open_writer: Callable[[], ContentWriter], *, limit: int, too_large: str
) -> Upload:
    """Read the form to its end and commit the content of the part `file`.

    Raises InvalidRequestError for what is no such form, RequestTooLargeError with the message
    `too_large` as soon as the file is known to exceed `limit` bytes, RequestTimeoutError if nothing
    comes for too long, and ClientGoneError.
    """
    if announced_bytes(request) > limit + _FRAMING_BYTES:
        raise RequestTooLargeError(too_large, param="file")
    form = _Form()
    parser = MultipartParser(_boundary(request), form.callbacks())
    async with AsyncExitStack() as stack:
        writer: ContentWriter | None = None
        try:
            async for chunk in _paced(request.stream()):
                parser.write(chunk)
                if form.upload.size > limit:
                    raise RequestTooLargeError(too_large, param="file")
                if form.waiting_bytes >= CHUNK_BYTES:
                    if writer is None:
                        writer = await stack.enter_async_context(open_writer())
                    await writer.write(form.take())
            parser.finalize()
        except ClientDisconnect:
            raise ClientGoneError from None
        except FormParserError as error:
            raise _no_form(str(error)) from None
        if not form.ended:
            raise _no_form("the last boundary is missing")
        if form.upload.filename is not None:
            if writer is None:
                writer = await stack.enter_async_context(open_writer())
            await writer.write(form.take())
            await writer.commit()
    return form.upload


async def _paced(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks, as long as they keep coming: a whole file may take any time. Raises
    RequestTimeoutError."""
    while True:
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise RequestTimeoutError(
                f"Nothing of the file came for {PAUSE_SECONDS:g} s; upload it again.", param="file"
            ) from None
        if chunk is None:
            return
        yield chunk


def _boundary(request: Request) -> bytes:
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise InvalidRequestError(
            "Files are uploaded as multipart/form-data with the parts file and purpose.",
            code="unsupported_content_type",
        )
    return boundary


def _no_form(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The body is not a valid multipart form ({reason[:200]}); send the parts file and "
        "purpose.",
        code="invalid_multipart",
    )


class _Form:
    """What the parser's callbacks found so far."""

    def __init__(self) -> None:
        self.upload = Upload()
        self.ended = False
        self.waiting_bytes = 0
        self._waiting: list[bytes] = []
        self._parts = 0
        self._name = ""
        self._is_file = False
        self._header = [b"", b""]
        self._disposition = b""
        self._text = b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, start, end: self._add_data(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        """The file's bytes that are not written yet."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        self.waiting_bytes = 0
        return data

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _no_form(f"more than {MAX_PARTS} parts")
        self._header = [b"", b""]
        self._disposition = self._text = b""

    def _add_header(self, side: int, data: bytes) -> None:
        self._header[side] += data

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _end_headers(self) -> None:
        _, parameters = parse_options_header(self._disposition.decode("latin-1"))
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.upload.filename is not None:
                raise _no_form("more than one file")
            # Latin-1 is the parser's way to pass bytes; browsers and clients send UTF-8.
            name = parameters.get(b"filename", b"upload").decode("utf-8", "replace")
            self.upload.filename = name[:255] or "upload"

    def _add_data(self, data: bytes) -> None:
        if self._is_file:
            self._waiting.append(data)
            self.waiting_bytes += len(data)
            self.upload.size += len(data)
            return
        self._text += data
        if len(self._text) > MAX_FIELD_BYTES:
            raise _no_form(f"{self._name[:64]} is longer than {MAX_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if not self._is_file:
            self.upload.fields[self._name] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self.ended = True
