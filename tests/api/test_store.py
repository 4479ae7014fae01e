"""The store of one host: records, leases, parts, content; several processes; versions."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.api import store_sqlite
from headrace.api.store import LeaseLostError, Part, Record, read_chunks
from headrace.api.store_sqlite import SqliteStore
from headrace.errors import ConfigError, StoreVersionError


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path)
    await store.open()
    yield store
    await store.close()


def thing(name: str, **more: object) -> Record:
    return Record(kind="thing", id=name, **{"value": {"n": 0}, **more})  # type: ignore[arg-type]


def bumped(record: Record) -> Record:
    return replace(record, value={"n": record.value["n"] + 1})


async def ids(store: SqliteStore, **how: object) -> list[str]:
    page = await store.page("thing", **{"limit": 100, **how})  # type: ignore[arg-type]
    return [record.id for record in page.records]


async def test_records_are_put_replaced_and_deleted(store: SqliteStore) -> None:
    assert await store.get("thing", "a") is None
    record = thing("a", tag="x", expires_at=int(time.time()) + 100, content_bytes=3)
    await store.put(record)
    assert await store.get("thing", "a") == record
    assert await store.get("other", "a") is None
    await store.put(thing("a", value={"lone": "é"}))
    found = await store.get("thing", "a")
    assert found is not None and found.value == {"lone": "é"} and found.tag == ""
    assert await store.delete("thing", "a")
    assert not await store.delete("thing", "a")
    assert await store.get("thing", "a") is None


async def test_pages_follow_the_order_of_creation(store: SqliteStore) -> None:
    for name in "abcde":
        await store.put(thing(name, tag="vowel" if name in "ae" else "", created_at=7))
    await store.put(thing("b", value={"n": 1}))  # keeps its place
    assert await ids(store) == list("edcba")
    assert await ids(store, newest_first=False) == list("abcde")
    assert await ids(store, tag="vowel") == ["e", "a"]
    assert await ids(store, after="d", limit=2) == ["c", "b"]
    assert await ids(store, after="d", newest_first=False) == ["e"]
    assert (await store.page("thing", limit=4)).has_more
    assert not (await store.page("thing", limit=5)).has_more
    with pytest.raises(KeyError):
        await store.page("thing", limit=1, after="z")


async def test_what_expired_is_gone_and_swept(store: SqliteStore, tmp_path: Path) -> None:
    async with store.writer("thing", "old") as writer:
        await writer.write(b"abc")
        await writer.commit()
    await store.put(thing("old", expires_at=int(time.time()) - 1, content_bytes=3))
    await store.put(thing("new", expires_at=int(time.time()) + 100))
    assert await store.get("thing", "old") is None
    assert await ids(store) == ["new"]
    assert await store.sweep() == 1
    assert list((tmp_path / "contents").iterdir()) == []
    assert await ids(store) == ["new"]


async def test_trim_keeps_the_newest(store: SqliteStore) -> None:
    for name in "abcd":
        await store.put(thing(name))
    await store.put(Record(kind="other", id="a", value={}))
    assert await store.trim("thing", keep=2) == 2
    assert await ids(store) == ["d", "c"]
    assert await store.get("other", "a") is not None


async def test_updates_lose_nothing(store: SqliteStore, tmp_path: Path) -> None:
    other = SqliteStore(tmp_path)
    await other.open()
    await store.put(thing("a"))
    await asyncio.gather(
        *(one.update("thing", "a", bumped) for one in (store, other) for _ in range(50))
    )
    found = await store.get("thing", "a")
    assert found is not None and found.value == {"n": 100}
    assert await store.update("thing", "b", bumped) is None
    await other.close()


async def test_a_change_that_fails_changes_nothing(store: SqliteStore) -> None:
    await store.put(thing("a"))

    def fails(record: Record) -> Record:
        raise ValueError

    with pytest.raises(ValueError):
        await store.update("thing", "a", fails)
    await store.put(thing("b"))  # no transaction is left open
    assert await ids(store) == ["b", "a"]


async def test_a_lease_has_one_holder(store: SqliteStore) -> None:
    await store.put(thing("a"))
    assert await store.lease("thing", "a", "me", 60)
    assert await store.lease("thing", "a", "me", 60), "extended"
    assert not await store.lease("thing", "a", "you", 60)
    await store.release("thing", "a", "you")
    assert not await store.lease("thing", "a", "you", 60), "not yours to release"
    await store.put(thing("a"))
    assert not await store.lease("thing", "a", "you", 60), "a lease outlives the record's values"
    await store.release("thing", "a", "me")
    assert await store.lease("thing", "a", "you", 60)
    assert not await store.lease("thing", "absent", "me", 60)


async def test_who_has_lost_the_lease_changes_nothing(store: SqliteStore) -> None:
    await store.put(thing("a"))
    assert await store.lease("thing", "a", "me", 0.05)
    await store.add_parts("thing", "a", [Part(1, "t", b"mine")], owner="me")
    await asyncio.sleep(0.06)
    with pytest.raises(LeaseLostError):
        await store.add_parts("thing", "a", [Part(2, "t", b"late")], owner="me")
    assert await store.lease("thing", "a", "you", 60)
    with pytest.raises(LeaseLostError):
        await store.update("thing", "a", bumped, owner="me")
    assert await store.count_parts("thing", "a") == {"t": 1}
    assert (await store.get("thing", "a") or thing("")).value == {"n": 0}
    assert await store.update("thing", "a", bumped, owner="you")


async def test_parts_come_once_and_in_order(store: SqliteStore) -> None:
    await store.put(thing("a"))
    await store.lease("thing", "a", "me", 60)
    parts = [Part(3, "t", b"3"), Part(1, "t", b"1"), Part(2, "u", b"2")]
    await store.add_parts("thing", "a", parts, owner="me")
    await store.add_parts("thing", "a", [Part(1, "u", b"again")], owner="me")
    found = await store.parts("thing", "a", tag="t", after=0, limit=10)
    assert found == [parts[1], parts[0]]
    assert await store.parts("thing", "a", tag="t", after=1, limit=10) == [parts[0]]
    assert await store.part_numbers("thing", "a") == {"t": [1, 3], "u": [2]}
    assert await store.bytes_used() == len(b'{"n":0}') + 3
    await store.drop_parts("thing", "a")
    assert await store.part_numbers("thing", "a") == {}


async def test_content_is_there_when_it_is_whole(store: SqliteStore, tmp_path: Path) -> None:
    # As an id, a path is a name like any other.
    async with store.writer("thing", "../../evil") as writer:
        await writer.write(b"abc" * 1000)
        with pytest.raises(KeyError):
            await store.read("thing", "../../evil", 0, 1)
        await writer.commit()
    assert await store.read("thing", "../../evil", 2999, 10) == b"c"
    chunks = [chunk async for chunk in read_chunks(store, "thing", "../../evil")]
    assert b"".join(chunks) == b"abc" * 1000
    async with store.writer("thing", "half") as writer:
        await writer.write(b"abc")
    with pytest.raises(KeyError):
        await store.read("thing", "half", 0, 1)
    assert len(list((tmp_path / "contents").iterdir())) == 1
    assert not list(tmp_path.parent.glob("evil*"))


async def test_sweep_drops_content_without_a_record(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kept", "orphan"):
        async with store.writer("thing", name) as writer:
            await writer.write(b"abc")
            await writer.commit()
    await store.put(thing("kept", content_bytes=3))
    await store.sweep()
    assert await store.read("thing", "orphan", 0, 3) == b"abc", "its record may be on its way"
    monkeypatch.setattr(store_sqlite, "ABANDONED_SECONDS", -1)
    await store.sweep()
    assert await store.read("thing", "kept", 0, 3) == b"abc"
    with pytest.raises(KeyError):
        await store.read("thing", "orphan", 0, 3)


async def test_another_schema_version_is_named(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.open()
    await store.close()
    with sqlite3.connect(tmp_path / "store.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreVersionError, match=r"version 99.*reads version 1.*--data-dir"):
        await SqliteStore(tmp_path).open()


async def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "share" / "headrace")
    await store.open()
    await store.close()
    assert (tmp_path / "share" / "headrace").stat().st_mode & 0o777 == 0o700


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/data cannot be used.*--data-dir"):
        await SqliteStore(tmp_path / "file" / "data").open()
    (tmp_path / "store.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        await SqliteStore(tmp_path).open()


_OPENS_AND_COUNTS = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from headrace.api.store import Record
from headrace.api.store_sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    for _ in range(20):
        await store.put(Record(kind="thing", id=sys.argv[2], value={}))
        await store.update("thing", sys.argv[2], lambda record: replace(record, tag="changed"))
    await store.close()

asyncio.run(main())
"""


async def test_processes_share_a_folder_from_its_first_moment(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "server")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPENS_AND_COUNTS, str(tmp_path), f"p{number}"],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    store = SqliteStore(tmp_path)
    await store.open()
    assert sorted(await ids(store)) == ["p0", "p1", "p2"]
    await store.close()
