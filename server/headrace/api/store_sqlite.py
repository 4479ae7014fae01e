"""A Store in a folder of one host: records in SQLite (WAL), contents as files beside it.

https://www.sqlite.org/wal.html. Any number of processes on the host may share the folder. What was
committed outlives the death of a process; a power cut may take the last moments with it
(synchronous=NORMAL), but breaks nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from headrace.api.store import LeaseLostError, Page, Part, Record
from headrace.errors import ConfigError, StoreVersionError

T = TypeVar("T")

SCHEMA_VERSION = 1
ABANDONED_SECONDS = 24 * 3600
"""Content without a record that was not written to for so long has nobody who goes on with it."""

_SCHEMA = """
CREATE TABLE records (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    tag TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    content_bytes INTEGER NOT NULL,
    value BLOB NOT NULL,
    lease_owner TEXT,
    lease_until REAL NOT NULL DEFAULT 0,
    UNIQUE (kind, id)
);
CREATE INDEX records_in_order ON records (kind, number);
CREATE INDEX records_that_expire ON records (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE parts (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    tag TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (kind, id, number)
);
CREATE INDEX parts_by_tag ON parts (kind, id, tag, number);
"""
_COLUMNS = "kind, id, value, tag, created_at, expires_at, content_bytes"
_LIVE = "(expires_at IS NULL OR expires_at > :now)"
_HELD = (
    "EXISTS (SELECT 1 FROM records WHERE kind = :kind AND id = :id AND lease_owner = :owner"
    " AND lease_until > :now)"
)


class SqliteStore:
    """`open` it; every method then runs on the store's own thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One thread, so that statements of a transaction follow each other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._connection: sqlite3.Connection

    async def open(self) -> None:
        """Make the folder and its tables where they are not there yet.

        Raises StoreVersionError for a store of another version, ConfigError for a folder that
        cannot be used.
        """
        try:
            await self._run(self._open)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"The data folder {self.folder} cannot be used: {error}. Choose another --data-dir."
            ) from None

    def _open(self) -> None:
        # What people send is nobody else's to read.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._contents.mkdir(exist_ok=True)
        connection = sqlite3.connect(
            self.folder / "store.sqlite3", timeout=30, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        self._connection = connection
        with _Transaction(connection):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StoreVersionError(
                    f"The data folder {self.folder} has schema version {version}, this server "
                    f"reads version {SCHEMA_VERSION}. Choose another --data-dir, or run the "
                    "version of Headrace that wrote it."
                )

    async def close(self) -> None:
        def close() -> None:
            with suppress(AttributeError):  # it was never opened
                self._connection.close()

        await self._run(close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- records ----------------------------------------------------------------------------

    async def put(self, record: Record) -> None:
        await self._run(lambda: self._put(record))

    def _put(self, record: Record) -> None:
        self._connection.execute(
            f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, id) DO UPDATE SET value = excluded.value, tag = excluded.tag, "
            "created_at = excluded.created_at, expires_at = excluded.expires_at, "
            "content_bytes = excluded.content_bytes",
            (
                record.kind,
                record.id,
                msgspec.json.encode(record.value),
                record.tag,
                record.created_at,
                record.expires_at,
                record.content_bytes,
            ),
        )

    async def get(self, kind: str, record_id: str) -> Record | None:
        return await self._run(lambda: self._get(kind, record_id))

    def _get(self, kind: str, record_id: str) -> Record | None:
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM records WHERE kind = :kind AND id = :id AND {_LIVE}",
            {"kind": kind, "id": record_id, "now": time.time()},
        ).fetchone()
        return _record(row) if row else None

    async def update(
        self,
        kind: str,
        record_id: str,
        change: Callable[[Record], Record],
        *,
        owner: str | None = None,
    ) -> Record | None:
        def work() -> Record | None:
            with _Transaction(self._connection):
                if owner is not None:
                    self._check_lease(kind, record_id, owner)
                record = self._get(kind, record_id)
                if record is None:
                    return None
                changed = change(record)
                self._put(changed)
                return changed

        return await self._run(work)

    async def delete(self, kind: str, record_id: str) -> bool:
        return await self._run(lambda: self._delete([(kind, record_id)]) > 0)

    def _delete(self, keys: list[tuple[str, str]]) -> int:
        deleted = 0
        for key in keys:
            with _Transaction(self._connection):
                cursor = self._connection.execute(
                    "DELETE FROM records WHERE kind = ? AND id = ?", key
                )
                self._connection.execute("DELETE FROM parts WHERE kind = ? AND id = ?", key)
                deleted += cursor.rowcount
            # After the record: a crash in between leaves a file that nobody reaches.
            self._path(*key).unlink(missing_ok=True)
        return deleted

    async def page(
        self,
        kind: str,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
        tag: str | None = None,
    ) -> Page:
        def work() -> Page:
            values = {"kind": kind, "tag": tag, "now": time.time(), "limit": limit + 1}
            where = f"kind = :kind AND {_LIVE}" + (" AND tag = :tag" if tag is not None else "")
            if after is not None:
                found = self._connection.execute(
                    "SELECT number FROM records WHERE kind = ? AND id = ?", (kind, after)
                ).fetchone()
                if found is None:
                    raise KeyError(after)
                values["after"] = found[0]
                where += f" AND number {'<' if newest_first else '>'} :after"
            rows = self._connection.execute(
                f"SELECT {_COLUMNS} FROM records WHERE {where} "
                f"ORDER BY number {'DESC' if newest_first else 'ASC'} LIMIT :limit",
                values,
            ).fetchall()
            return Page([_record(row) for row in rows[:limit]], len(rows) > limit)

        return await self._run(work)

    async def trim(self, kind: str, *, keep: int) -> int:
        def work() -> int:
            rows = self._connection.execute(
                "SELECT kind, id FROM records WHERE kind = ? "
                "ORDER BY number DESC LIMIT -1 OFFSET ?",
                (kind, keep),
            ).fetchall()
            return self._delete(rows)

        return await self._run(work)

    async def sweep(self) -> int:
        def work() -> int:
            now = time.time()
            rows = self._connection.execute(
                "SELECT kind, id FROM records WHERE expires_at <= ?", (now,)
            ).fetchall()
            deleted = self._delete(rows)
            kept = self._connection.execute(
                "SELECT kind, id FROM records WHERE content_bytes > 0"
            ).fetchall()
            names = {self._path(*key).name for key in kept}
            for path in self._contents.iterdir():
                with suppress(FileNotFoundError):  # its writer, or another process, was faster
                    if path.name not in names and now - path.stat().st_mtime > ABANDONED_SECONDS:
                        path.unlink()
            return deleted

        return await self._run(work)

    async def bytes_used(self) -> int:
        def work() -> int:
            (used,) = self._connection.execute(
                "SELECT (SELECT COALESCE(SUM(content_bytes + LENGTH(value)), 0) FROM records)"
                " + (SELECT COALESCE(SUM(LENGTH(value)), 0) FROM parts)"
            ).fetchone()
            return int(used)

        return await self._run(work)

    # --- leases -----------------------------------------------------------------------------

    async def lease(self, kind: str, record_id: str, owner: str, seconds: float) -> bool:
        def work() -> bool:
            now = time.time()
            cursor = self._connection.execute(
                "UPDATE records SET lease_owner = ?, lease_until = ? WHERE kind = ? AND id = ? "
                "AND (lease_owner IS NULL OR lease_owner = ? OR lease_until <= ?)",
                (owner, now + seconds, kind, record_id, owner, now),
            )
            return cursor.rowcount == 1

        return await self._run(work)

    async def release(self, kind: str, record_id: str, owner: str) -> None:
        def work() -> None:
            self._connection.execute(
                "UPDATE records SET lease_owner = NULL WHERE kind = ? AND id = ? "
                "AND lease_owner = ?",
                (kind, record_id, owner),
            )

        await self._run(work)

    def _check_lease(self, kind: str, record_id: str, owner: str) -> None:
        values = {"kind": kind, "id": record_id, "owner": owner, "now": time.time()}
        if not self._connection.execute(f"SELECT {_HELD}", values).fetchone()[0]:
            raise LeaseLostError(record_id)

    # --- parts ------------------------------------------------------------------------------

    async def add_parts(self, kind: str, record_id: str, parts: list[Part], *, owner: str) -> None:
        def work() -> None:
            with _Transaction(self._connection):
                self._check_lease(kind, record_id, owner)
                self._connection.executemany(
                    "INSERT OR IGNORE INTO parts (kind, id, number, tag, value) "
                    "VALUES (?, ?, ?, ?, ?)",
                    [(kind, record_id, part.number, part.tag, part.value) for part in parts],
                )

        await self._run(work)

    async def parts(
        self, kind: str, record_id: str, *, tag: str, after: int, limit: int
    ) -> list[Part]:
        def work() -> list[Part]:
            rows = self._connection.execute(
                "SELECT number, tag, value FROM parts WHERE kind = ? AND id = ? AND tag = ? "
                "AND number > ? ORDER BY number LIMIT ?",
                (kind, record_id, tag, after, limit),
            ).fetchall()
            return [Part(*row) for row in rows]

        return await self._run(work)

    async def part_numbers(self, kind: str, record_id: str) -> dict[str, list[int]]:
        def work() -> dict[str, list[int]]:
            numbers: dict[str, list[int]] = {}
            for tag, number in self._connection.execute(
                "SELECT tag, number FROM parts WHERE kind = ? AND id = ? ORDER BY number",
                (kind, record_id),
            ):
                numbers.setdefault(tag, []).append(number)
            return numbers

        return await self._run(work)

    async def count_parts(self, kind: str, record_id: str) -> dict[str, int]:
        def work() -> dict[str, int]:
            return dict(
                self._connection.execute(
                    "SELECT tag, COUNT(*) FROM parts WHERE kind = ? AND id = ? GROUP BY tag",
                    (kind, record_id),
                ).fetchall()
            )

        return await self._run(work)

    async def drop_parts(self, kind: str, record_id: str) -> None:
        def work() -> None:
            self._connection.execute(
                "DELETE FROM parts WHERE kind = ? AND id = ?", (kind, record_id)
            )

        await self._run(work)

    # --- content ----------------------------------------------------------------------------

    @property
    def _contents(self) -> Path:
        return self.folder / "contents"

    def _path(self, kind: str, record_id: str) -> Path:
        # An id may hold anything; a file name may not.
        return self._contents / hashlib.sha256(f"{kind}/{record_id}".encode()).hexdigest()

    def writer(self, kind: str, record_id: str) -> SqliteContentWriter:
        return SqliteContentWriter(self._path(kind, record_id))

    async def read(self, kind: str, record_id: str, offset: int, size: int) -> bytes:
        def work() -> bytes:
            try:
                with self._path(kind, record_id).open("rb") as content:
                    content.seek(offset)
                    return content.read(size)
            except FileNotFoundError:
                raise KeyError(record_id) from None

        # On any thread: a slow disk holds up no records.
        return await asyncio.to_thread(work)


class SqliteContentWriter:
    """Writes beside the final place, and moves there when all is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = path.with_name(f"{path.name}-{secrets.token_hex(4)}.part")
        self._output: BinaryIO

    async def __aenter__(self) -> SqliteContentWriter:
        self._output = await asyncio.to_thread(self._unfinished.open, "wb")
        return self

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._output.write, data)

    async def commit(self) -> None:
        def work() -> None:
            self._output.flush()
            os.fsync(self._output.fileno())
            self._output.close()
            self._unfinished.replace(self._path)

        await asyncio.to_thread(work)

    async def __aexit__(self, *error: object) -> None:
        self._output.close()
        self._unfinished.unlink(missing_ok=True)


class _Transaction:
    """From here on no other process writes; committed at the end, undone by an exception."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _record(row: tuple[str, str, bytes, str, int, int | None, int]) -> Record:
    kind, record_id, value, tag, created_at, expires_at, content_bytes = row
    return Record(
        kind=kind,
        id=record_id,
        value=msgspec.json.decode(value),
        tag=tag,
        created_at=created_at,
        expires_at=expires_at,
        content_bytes=content_bytes,
    )
