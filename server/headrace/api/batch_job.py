"""One batch, from wherever it stands to its end.

The answer to each line is kept as a part of the batch's record as soon as it is there, so that
whoever goes on after a crash knows what is left to do. The files are made of the parts at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.types import ASGIApp

from headrace.api.batch_input import BadLine, Contents, Line, parse_line, scan
from headrace.api.batches import BATCH, ERROR, OUTPUT, with_status
from headrace.api.files import FILE
from headrace.api.generation import new_id
from headrace.api.inner_request import Answer, post
from headrace.api.services import Services
from headrace.api.store import Part, Record, Store
from headrace.engine.client import EngineClient
from headrace.errors import ModelNotFoundError, UnavailableError

MAX_NAMED_ERRORS = 50
PASSING = (429, 503)
"""Statuses of a server that is busy, loading or has lost its engine: the line is tried again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
_PAGE = 100
_encode = msgspec.json.encode


class _Tokens(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """By the names of completions, or by those of responses."""

    prompt_tokens: int = 0
    input_tokens: int = 0
    completion_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Tokens | None = None
    input_tokens_details: _Tokens | None = None
    completion_tokens_details: _Tokens | None = None
    output_tokens_details: _Tokens | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Output(msgspec.Struct):
    response: _Response


class BatchJob:
    """Works under a lease that somebody else takes, extends and gives back; `owner` holds it."""

    def __init__(self, app: ASGIApp, services: Services, batch: Record, owner: str) -> None:
        self._app = app
        self._services = services
        self._store: Store = services.kept()
        self._batch = batch
        self._owner = owner

    async def run(self) -> None:
        """Answer all lines, and complete. Cancelled, it leaves what is done; raises LeaseLostError
        when the lease is another's by now."""
        status = self._batch.value["status"]
        if status == "validating" and not await self._begin():
            return
        if status != "finalizing":
            contents = await self._scan()
            done = await self._store.part_numbers(BATCH, self._batch.id)
            known = {number for numbers in done.values() for number in numbers}
            await self._answer([line for line in contents.lines if line.number not in known])
        await self._finish("completed")

    async def end(self, status: str) -> None:
        """Before its time: with status "expired" or "cancelled" and what is done."""
        if status == "expired":
            await self._expire_lines()
        await self._finish(status)

    async def fail(self, errors: list[dict[str, Any]]) -> None:
        await self._update("failed", errors={"object": "list", "data": errors})
        await self._store.drop_parts(BATCH, self._batch.id)

    # --- lines ------------------------------------------------------------------------------

    async def _begin(self) -> bool:
        """False if no line can run; then the batch has failed."""
        try:
            contents = await self._scan()
        except KeyError:
            await self.fail([_error("input_file_not_found", "The input file is not there.")])
            return False
        if contents.too_many:
            await self.fail([_error("too_many_lines", "The file has too many lines; split it.")])
            return False
        if not contents.lines:
            bad = contents.bad[:MAX_NAMED_ERRORS]
            errors = [_error(line.code, line.message, line.number) for line in bad]
            await self.fail(errors or [_error("empty_file", "The file has no lines.")])
            return False
        parts = [Part(line.number, ERROR, _refusal(line)) for line in contents.bad]
        await self._add(parts)
        counts = {"total": contents.total, "completed": 0, "failed": 0}
        await self._update("in_progress", request_counts=counts)
        return True

    async def _scan(self) -> Contents:
        value = self._batch.value
        limit = self._services.config.max_body_bytes
        return await scan(
            self._store, value["input_file_id"], value["endpoint"], max_line_bytes=limit
        )

    async def _answer(self, lines: list[Line]) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            for line in lines:
                while self._room(len(running)) <= 0:
                    running = await _some_end(running)
                running.add(asyncio.create_task(self._answer_line(line)))
            while running:
                running = await _some_end(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _room(self, num_running: int) -> int:
        """How many more lines may start: half of the engine's rows, at most, are for batches, one
        is always free, and while anything waits nothing is added to it."""
        client = self._client()
        if client is None:
            return 0
        info, stats = client.info, client.stats
        if info is None or stats.waiting:
            return 0
        most = self._services.config.batch_concurrency or max(1, info.max_num_seqs // 2)
        others = max(0, stats.running - num_running)
        kept_free = 1 if info.max_num_seqs > 1 else 0
        return min(most, info.max_num_seqs - others - kept_free) - num_running

    def _client(self) -> EngineClient | None:
        """Of the batch's model; None when that was unloaded since, and is waited for."""
        try:
            return self._services.models.find(self._batch.value["model"]).client
        except (ModelNotFoundError, UnavailableError):
            return None

    async def _answer_line(self, line: Line) -> None:
        value = self._batch.value
        raw = await self._store.read(FILE, value["input_file_id"], line.offset, line.length)
        request = parse_line(raw, value["endpoint"])
        request_id = f"{self._batch.id}-{line.number}"
        answer = await self._ask(value["endpoint"], request.body, request_id)
        entry = {
            "id": new_id("batch_req").replace("-", "_"),
            "custom_id": request.custom_id,
            "response": {
                "status_code": answer.status,
                "request_id": request_id,
                "body": msgspec.Raw(answer.body),
            },
            "error": None,
        }
        tag = OUTPUT if answer.status < 400 else ERROR
        await self._add([Part(line.number, tag, _encode(entry))])

    async def _ask(self, path: str, body: bytes, request_id: str) -> Answer:
        pause = FIRST_PAUSE
        while True:
            answer = await post(self._app, path, body, request_id=request_id)
            if answer.status not in PASSING and not self._went(answer):
                return answer
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _went(self, answer: Answer) -> bool:
        """Whether the model may have been unloaded between a line's start and its endpoint."""
        return answer.status == 404 and self._client() is None

    async def _expire_lines(self) -> None:
        """What was not answered is named in the error file."""
        try:
            contents = await self._scan()
        except KeyError:
            return
        message = "This request could not be executed before the completion window expired."
        value = self._batch.value
        parts = [Part(line.number, ERROR, _refusal(line)) for line in contents.bad]
        for line in contents.lines:
            raw = await self._store.read(FILE, value["input_file_id"], line.offset, line.length)
            custom_id = parse_line(raw, value["endpoint"]).custom_id
            late = BadLine(line.number, custom_id, "batch_expired", message)
            parts.append(Part(line.number, ERROR, _refusal(late)))
            if len(parts) >= _PAGE:
                await self._add(parts)
                parts = []
        await self._add(parts)

    async def _add(self, parts: list[Part]) -> None:
        """Lines that have an answer keep it."""
        await self._store.add_parts(BATCH, self._batch.id, parts, owner=self._owner)

    # --- the end ----------------------------------------------------------------------------

    async def _finish(self, status: str) -> None:
        if status == "completed":
            await self._update("finalizing")
        counts = await self._store.count_parts(BATCH, self._batch.id)
        usage = _no_usage()
        output_id = await self._write_file(OUTPUT, usage) if counts.get(OUTPUT) else None
        error_id = await self._write_file(ERROR, None) if counts.get(ERROR) else None
        total = self._batch.value["request_counts"]["total"] or sum(counts.values())
        await self._update(
            status,
            output_file_id=output_id,
            error_file_id=error_id,
            usage=usage if output_id else None,
            request_counts={
                "total": total,
                "completed": counts.get(OUTPUT, 0),
                "failed": counts.get(ERROR, 0),
            },
        )
        await self._store.drop_parts(BATCH, self._batch.id)

    async def _write_file(self, tag: str, usage: dict[str, Any] | None) -> str:
        """The parts with `tag` as a file; its id. Made again, it is the same file."""
        batch_id = self._batch.id
        file_id = "file-" + hashlib.sha256(f"{batch_id}/{tag}".encode()).hexdigest()[:24]
        size = 0
        async with self._store.writer(FILE, file_id) as writer:
            async for values in self._parts(tag):
                if usage is not None:
                    await asyncio.to_thread(_add_usage, usage, values)
                data = b"".join(value + b"\n" for value in values)
                await writer.write(data)
                size += len(data)
            await writer.commit()
        now = int(time.time())
        seconds = self._batch.value["output_seconds"]
        record = Record(
            kind=FILE,
            id=file_id,
            value={"filename": f"{batch_id}_{tag}.jsonl"},
            tag="batch_output",
            created_at=now,
            expires_at=now + seconds if seconds else None,
            content_bytes=size,
        )
        await self._store.put(record)
        return file_id

    async def _parts(self, tag: str) -> AsyncIterator[list[bytes]]:
        after = 0
        while parts := await self._store.parts(
            BATCH, self._batch.id, tag=tag, after=after, limit=_PAGE
        ):
            yield [part.value for part in parts]
            after = parts[-1].number

    async def _update(self, status: str, **changes: Any) -> None:
        batch = await self._store.update(
            BATCH,
            self._batch.id,
            lambda record: _moved(record, status, changes),
            owner=self._owner,
        )
        assert batch is not None, "batches are never deleted"
        self._batch = batch


def _moved(record: Record, status: str, changes: dict[str, Any]) -> Record:
    """A request to cancel that came in between is not forgotten."""
    if record.value["status"] == "cancelling":
        if status in ("in_progress", "finalizing"):
            return record
        status = "cancelled" if status == "completed" else status
    return with_status(record, status, **changes)


async def _some_end(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait until one ends, or for a moment; those that still run. Raises what one raised."""
    if not running:
        await asyncio.sleep(0.05)
        return running
    done, pending = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
    try:
        for task in done:
            task.result()
    except BaseException:
        running.intersection_update(pending)
        raise
    return pending


def _refusal(line: BadLine) -> bytes:
    return _encode(
        {
            "id": new_id("batch_req").replace("-", "_"),
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": line.code, "message": line.message, "line": line.number},
        }
    )


def _error(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": None}


def _no_usage() -> dict[str, Any]:
    return {
        "input_tokens": 0,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 0,
    }


def _add_usage(total: dict[str, Any], outputs: list[bytes]) -> None:
    for raw in outputs:
        usage = msgspec.json.decode(raw, type=_Output).response.body.usage
        if usage is None:
            continue
        given = usage.prompt_tokens + usage.input_tokens
        made = usage.completion_tokens + usage.output_tokens
        total["input_tokens"] += given
        total["output_tokens"] += made
        total["total_tokens"] += given + made
        if (details := usage.prompt_tokens_details or usage.input_tokens_details) is not None:
            total["input_tokens_details"]["cached_tokens"] += details.cached_tokens
        if (details := usage.completion_tokens_details or usage.output_tokens_details) is not None:
            total["output_tokens_details"]["reasoning_tokens"] += details.reasoning_tokens
