"""/v1/batches: a file of requests, answered when there is nothing better to do.

https://platform.openai.com/docs/api-reference/batch. The routes only keep records; batch_runner.py
does the work, in whatever process gets to it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from headrace.api.batch_input import ENDPOINTS, first_model
from headrace.api.body import receive
from headrace.api.error_response import json_response
from headrace.api.files import DAY, FILE, check_expiry, find_file
from headrace.api.generation import new_id
from headrace.api.listing import list_answer, read_page
from headrace.api.metadata import Metadata, check_metadata
from headrace.api.services import services_of
from headrace.api.store import Record, Store
from headrace.errors import InvalidRequestError, NotFoundError

router = APIRouter()

BATCH = "batch"
OPEN, CLOSED = "open", "closed"
"""Tags of the records: whether there is still something to do."""
OUTPUT, ERROR = "output", "error"
"""Tags of the parts: which file an answer goes to."""
_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(strict=True)

    anchor: str
    seconds: int


class BatchRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        """Raises InvalidRequestError for a value that is not taken."""
        if self.endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"endpoint must be one of {', '.join(ENDPOINTS)}, got {self.endpoint[:100]!r}.",
                param="endpoint",
            )
        if self.completion_window != "24h":
            raise InvalidRequestError(
                f"completion_window must be '24h', got {self.completion_window[:32]!r}.",
                param="completion_window",
            )
        check_metadata(self.metadata)
        if (kept := self.output_expires_after) is not None:
            check_expiry(kept.anchor, kept.seconds, param="output_expires_after")


@router.post("/v1/batches")
async def create_batch(request: Request) -> Response:
    """Its lines are answered while the server has nothing better to do, within 24 hours."""
    services = services_of(request)
    store = services.kept()
    body, ignored = await receive(request, BatchRequest)
    body.check()
    file = await find_file(store, body.input_file_id, param="input_file_id")
    if file.tag != "batch":
        raise InvalidRequestError(
            f"The file has the purpose {file.tag!r}; upload it with purpose 'batch'.",
            param="input_file_id",
        )
    model = services.models.find(await first_model(store, file.id, body.endpoint))
    record = _new_record(body, model.name)
    await store.update(FILE, file.id, lambda file: _kept_until(file, record.created_at + 2 * DAY))
    await store.put(record)
    services.batch_news.set()
    answer = await batch_object(store, record)
    if ignored:
        answer["headrace"] = {"ignored_fields": ignored}
    return json_response(answer)


@router.get("/v1/batches")
async def list_batches(request: Request) -> Response:
    """Newest first; `after` and `limit` turn pages."""
    store = services_of(request).kept()
    page = await read_page(request, store, BATCH, default=20, maximum=100)
    answer = await list_answer(page, lambda record: batch_object(store, record))
    return json_response(answer)


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request) -> Response:
    """Status and counts of this moment."""
    store = services_of(request).kept()
    batch_id: str = request.path_params["batch_id"]
    record = await store.get(BATCH, batch_id)
    if record is None:
        raise _not_found(batch_id)
    return json_response(await batch_object(store, record))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request) -> Response:
    """Lines that are done stay done: their answers are in the output file."""
    services = services_of(request)
    store = services.kept()
    batch_id: str = request.path_params["batch_id"]
    record = await store.update(BATCH, batch_id, _cancelling)
    if record is None:
        raise _not_found(batch_id)
    services.batch_news.set()
    return json_response(await batch_object(store, record))


async def batch_object(store: Store, record: Record) -> dict[str, Any]:
    """OpenAI's object; while the batch runs, with the counts of this moment."""
    value = dict(record.value)
    if record.tag == OPEN:
        counts = await store.count_parts(BATCH, record.id)
        value["request_counts"] = {
            "total": value["request_counts"]["total"],
            "completed": counts.get(OUTPUT, 0),
            "failed": counts.get(ERROR, 0),
        }
    value.pop("output_seconds", None)
    return value


def with_status(record: Record, status: str, **changes: Any) -> Record:
    """The record in another status, with the time at which it got there."""
    value = {**record.value, "status": status, **changes}
    if f"{status}_at" in _TIMES:
        value[f"{status}_at"] = int(time.time())
    done = status in ("completed", "failed", "expired", "cancelled")
    return replace(record, value=value, tag=CLOSED if done else OPEN)


def _kept_until(file: Record, time: int) -> Record:
    """An input must not expire before its batch has."""
    return file if file.expires_at is None else replace(file, expires_at=max(file.expires_at, time))


def _cancelling(record: Record) -> Record:
    status = record.value["status"]
    if status == "cancelling":
        return record
    if status not in ("validating", "in_progress"):
        raise InvalidRequestError(
            f"Cannot cancel a batch with status {status!r}.", param="batch_id"
        )
    return with_status(record, "cancelling")


def _not_found(batch_id: str) -> NotFoundError:
    return NotFoundError(f"No such Batch object: {batch_id[:100]}", param="batch_id")


def _new_record(body: BatchRequest, model: str) -> Record:
    now = int(time.time())
    batch_id = new_id("batch").replace("-", "_")
    kept = body.output_expires_after
    value: dict[str, Any] = {
        "id": batch_id,
        "object": "batch",
        "endpoint": body.endpoint,
        "model": model,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + DAY,
        **dict.fromkeys(_TIMES),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": body.metadata,
        "output_seconds": kept.seconds if kept else None,
    }
    return Record(kind=BATCH, id=batch_id, value=value, tag=OPEN, created_at=now)
