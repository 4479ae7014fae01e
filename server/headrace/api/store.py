"""What outlives a request: records, the content beside them, parts of work, and leases.

`Store` is the one interface for files, batches and stored responses. store_sqlite.py keeps them on
one host; a database or a folder of objects fits behind it as well: an `update` may be repeated
until nobody came in between, and nothing holds a transaction across two calls.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing that is kept: a JSON object under a kind ("file", "batch", ...) and an id."""

    kind: str
    id: str
    value: dict[str, Any]
    tag: str = ""
    """What lists of this kind are filtered by."""
    created_at: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds, as `expires_at`."""
    expires_at: int | None = None
    """From then on the record is as good as deleted."""
    content_bytes: int = 0
    """Of the content stored under the same kind and id; 0: there is none."""


@dataclass(frozen=True, slots=True)
class Page:
    records: list[Record]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A numbered piece of a record's work that is done, such as the answer to a batch's line."""

    number: int
    tag: str
    value: bytes


class LeaseLostError(Exception):
    """Another process has the lease by now: what this one does to the record does not count."""


class ContentWriter(Protocol):
    async def write(self, data: bytes) -> None: ...

    async def commit(self) -> None:
        """The content is complete and on disk; without it, leaving the writer drops it."""
        ...

    async def __aenter__(self) -> ContentWriter: ...

    async def __aexit__(self, *error: object) -> None: ...


class Store(Protocol):
    """Every method may be called from any number of processes at once, and blocks no event loop."""

    async def put(self, record: Record) -> None:
        """Insert a record, or replace the one of its kind and id."""
        ...

    async def get(self, kind: str, record_id: str) -> Record | None: ...

    async def update(
        self,
        kind: str,
        record_id: str,
        change: Callable[[Record], Record],
        *,
        owner: str | None = None,
    ) -> Record | None:
        """Read, change and write as one; None if there is no such record. `change` may run more
        than once. With `owner`: raises LeaseLostError unless it holds the lease."""
        ...

    async def delete(self, kind: str, record_id: str) -> bool:
        """The record with its content and parts. False if there was none."""
        ...

    async def page(
        self,
        kind: str,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
        tag: str | None = None,
    ) -> Page:
        """Records in the order they were made, from behind the one with id `after`. Raises KeyError
        if there is no such one."""
        ...

    async def trim(self, kind: str, *, keep: int) -> int:
        """Delete the oldest records but for `keep` of the kind; how many were deleted."""
        ...

    async def sweep(self) -> int:
        """Delete what has expired, and content that nobody committed; how many records."""
        ...

    async def bytes_used(self) -> int:
        """Of all records, contents and parts together."""
        ...

    # --- leases -----------------------------------------------------------------------------

    async def lease(self, kind: str, record_id: str, owner: str, seconds: float) -> bool:
        """Take the lease of a record, or extend one's own; False while another's lasts."""
        ...

    async def release(self, kind: str, record_id: str, owner: str) -> None: ...

    # --- parts ------------------------------------------------------------------------------

    async def add_parts(self, kind: str, record_id: str, parts: list[Part], *, owner: str) -> None:
        """Keep them; a number that is there already stays as it is. Raises LeaseLostError unless
        `owner` holds the record's lease."""
        ...

    async def parts(
        self, kind: str, record_id: str, *, tag: str, after: int, limit: int
    ) -> list[Part]:
        """Parts with numbers above `after`, in ascending order."""
        ...

    async def part_numbers(self, kind: str, record_id: str) -> dict[str, list[int]]:
        """tag -> the numbers that are there."""
        ...

    async def count_parts(self, kind: str, record_id: str) -> dict[str, int]:
        """tag -> how many there are."""
        ...

    async def drop_parts(self, kind: str, record_id: str) -> None: ...

    # --- content ----------------------------------------------------------------------------

    def writer(self, kind: str, record_id: str) -> ContentWriter:
        """Writes the content of a record that is put afterwards, replacing what was there."""
        ...

    async def read(self, kind: str, record_id: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end. Raises KeyError if there is no content."""
        ...

    async def close(self) -> None: ...


async def read_chunks(store: Store, kind: str, record_id: str) -> AsyncIterator[bytes]:
    """The whole content. Raises KeyError if it is not there, or is deleted meanwhile."""
    offset = 0
    while chunk := await store.read(kind, record_id, offset, CHUNK_BYTES):
        yield chunk
        offset += len(chunk)
