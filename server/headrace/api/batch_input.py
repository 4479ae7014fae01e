"""The lines of a batch's input file: where they are, and what is wrong with them.

https://platform.openai.com/docs/guides/batch: one JSON object a line, with custom_id, method, url
and body.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from headrace.api.store import Store, read_chunks
from headrace.sampling_params import BACKGROUND_PRIORITY

RESPONSES = "/v1/responses"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/embeddings")
MAX_LINES = 50_000
MAX_BLANK_LINES = 1_000_000
MAX_CUSTOM_ID = 512
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A good line, by its place in the file."""

    number: int
    """From 1 on; blank lines count."""
    offset: int
    length: int


class BadLine(NamedTuple):
    number: int
    custom_id: str | None
    code: str
    message: str


class LineError(Exception):
    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


@dataclass(slots=True)
class LineRequest:
    custom_id: str
    body: bytes
    """JSON, with the priority that all lines of batches have."""


@dataclass(slots=True)
class Contents:
    """What a file holds: at most MAX_LINES lines that are not blank, and whether there are more."""

    lines: list[Line] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    too_many: bool = False

    @property
    def total(self) -> int:
        return len(self.lines) + len(self.bad)


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, msgspec.Raw]


class _CustomId(msgspec.Struct):
    custom_id: str


async def scan(store: Store, file_id: str, endpoint: str, *, max_line_bytes: int) -> Contents:
    """Check every line. Holds one chunk and one line at a time. Raises KeyError without a file."""
    scanner = _Scanner(endpoint, max_line_bytes)
    async for chunk in read_chunks(store, "file", file_id):
        await asyncio.to_thread(scanner.feed, chunk)
        if scanner.contents.too_many:
            return scanner.contents
    scanner.end()
    return scanner.contents


async def first_model(store: Store, file_id: str, endpoint: str) -> str | None:
    """The model of the first good line among those in the file's first chunk."""
    raw = await store.read("file", file_id, 0, 1 << 20)
    for line in raw.removeprefix(_BOM).splitlines():
        try:
            body = parse_line(line, endpoint).body
            model = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get("model")
            return msgspec.json.decode(model, type=str | None) if model else None
        except (LineError, msgspec.MsgspecError):
            continue
    return None


def parse_line(raw: bytes, endpoint: str) -> LineRequest:
    """Raises LineError. What is in the body is the endpoint's to judge."""
    try:
        line = msgspec.json.decode(raw.strip(), type=_Line)
    except msgspec.ValidationError as error:
        raise LineError("invalid_line", f"{error}.", _custom_id(raw)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineError("invalid_json_line", f"The line is not valid JSON ({error}).") from None
    custom_id = line.custom_id
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(
            "invalid_custom_id", f"custom_id must have 1 to {MAX_CUSTOM_ID} characters."
        )
    if line.method != "POST":
        raise LineError("invalid_method", "method must be 'POST'.", custom_id)
    if line.url != endpoint:
        message = f"url must be the batch's endpoint, {endpoint!r}, got {line.url[:100]!r}."
        raise LineError("mismatched_endpoint", message, custom_id)
    if bytes(line.body.get("stream", msgspec.Raw(b"null"))) not in (b"null", b"false"):
        message = "body.stream must be false: the answers of a batch come in a file."
        raise LineError("invalid_request", message, custom_id)
    if line.url == RESPONSES:
        if bytes(line.body.get("background", msgspec.Raw(b"null"))) not in (b"null", b"false"):
            message = "body.background must be false: the answers of a batch come in a file."
            raise LineError("invalid_request", message, custom_id)
        # Unless asked for: a batch has more lines than there are responses that are kept.
        line.body.setdefault("store", msgspec.Raw(b"false"))
    line.body["priority"] = msgspec.Raw(str(BACKGROUND_PRIORITY).encode())
    return LineRequest(custom_id, msgspec.json.encode(line.body))


def _custom_id(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_CustomId).custom_id[:MAX_CUSTOM_ID]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class _Scanner:
    def __init__(self, endpoint: str, max_line_bytes: int) -> None:
        self.contents = Contents()
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._number = 0
        self._offset = 0
        self._begun = b""
        """Of a line whose end is in a later chunk; dropped when it is too long."""
        self._begun_bytes = 0
        self._custom_ids: set[str] = set()

    def feed(self, chunk: bytes) -> None:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece)
            self._line(1)
            if self.contents.too_many:
                return
        self._add(rest)

    def end(self) -> None:
        if self._begun_bytes:
            self._line(0)

    def _add(self, piece: bytes) -> None:
        self._begun_bytes += len(piece)
        self._begun = self._begun + piece if self._begun_bytes <= self._max_line_bytes else b""

    def _line(self, newline_bytes: int) -> None:
        raw, length, offset = self._begun, self._begun_bytes, self._offset
        self._begun, self._begun_bytes = b"", 0
        self._offset += length + newline_bytes
        self._number += 1
        if self._number == 1 and raw.startswith(_BOM):
            raw, length, offset = raw[3:], length - 3, offset + 3
        if not raw.strip() and length <= self._max_line_bytes:
            self.contents.too_many = self._number >= MAX_BLANK_LINES
            return
        if self.contents.total == MAX_LINES:
            self.contents.too_many = True
            return
        try:
            if length > self._max_line_bytes:
                raise LineError(
                    "line_too_long",
                    f"The line is longer than {self._max_line_bytes} bytes; shorten it, or start "
                    "the server with a larger --max-body-bytes.",
                )
            custom_id = parse_line(raw, self._endpoint).custom_id
            if custom_id in self._custom_ids:
                message = "custom_id must be unique in the file; an earlier line has it."
                raise LineError("duplicate_custom_id", message, custom_id)
        except LineError as error:
            bad = BadLine(self._number, error.custom_id, error.code, error.message)
            self.contents.bad.append(bad)
        else:
            self._custom_ids.add(custom_id)
            self.contents.lines.append(Line(self._number, offset, length))
