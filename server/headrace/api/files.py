"""/v1/files: inputs of batches, uploaded; their outputs, made here.

https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from headrace.api.error_response import json_response
from headrace.api.generation import new_id
from headrace.api.listing import list_answer, read_page
from headrace.api.services import Services, services_of
from headrace.api.store import Record, Store, read_chunks
from headrace.api.upload import Upload, receive_upload
from headrace.errors import (
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedParameterError,
)

router = APIRouter()

FILE = "file"
DAY = 24 * 3600
SHORTEST, LONGEST, DEFAULT = 3600, 30 * DAY, 30 * DAY
"""Seconds that a file may be kept."""

_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": SHORTEST, "maximum": LONGEST},
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@router.post("/v1/files", openapi_extra=_BODY)
async def upload_file(request: Request) -> Response:
    """At most --max-file-bytes, and only while all that is kept stays below --data-limit."""
    services = services_of(request)
    store = services.kept()
    file_id = new_id("file")
    limit, too_large = await _allowance(services, store)
    upload = await receive_upload(
        request, lambda: store.writer(FILE, file_id), limit=limit, too_large=too_large
    )
    try:
        record = _record(file_id, upload)
    except HeadraceError:
        await store.delete(FILE, file_id)
        raise
    await store.put(record)
    return json_response(file_object(record))


@router.get("/v1/files")
async def list_files(request: Request) -> Response:
    """Newest first unless `order` says otherwise; `after` and `limit` turn pages."""

    async def shape(record: Record) -> dict[str, Any]:
        return file_object(record)

    page = await read_page(
        request,
        services_of(request).kept(),
        FILE,
        default=10_000,
        maximum=10_000,
        tag=request.query_params.get("purpose"),
    )
    return json_response(await list_answer(page, shape))


@router.get("/v1/files/{file_id}")
async def get_file(request: Request) -> Response:
    """What is known of a file."""
    store = services_of(request).kept()
    return json_response(file_object(await find_file(store, request.path_params["file_id"])))


@router.get("/v1/files/{file_id}/content")
async def get_content(request: Request) -> Response:
    """The bytes of a file."""
    store = services_of(request).kept()
    record = await find_file(store, request.path_params["file_id"])
    name = quote(record.value["filename"], safe="")
    return StreamingResponse(
        read_chunks(store, FILE, record.id),
        media_type="application/octet-stream",
        headers={
            "content-length": str(record.content_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{name}",
        },
    )


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request) -> Response:
    """Not while a batch still reads it."""
    store = services_of(request).kept()
    record = await find_file(store, request.path_params["file_id"])
    if batch := await _batch_that_reads(store, record.id):
        raise InvalidRequestError(
            f"The file is the input of {batch}, which is not done; cancel that first.",
            param="file_id",
            code="file_in_use",
        )
    await store.delete(FILE, record.id)
    return json_response({"id": record.id, "object": "file", "deleted": True})


async def find_file(store: Store, file_id: str, *, param: str = "file_id") -> Record:
    """Raises NotFoundError."""
    record = await store.get(FILE, file_id)
    if record is None:
        raise NotFoundError(f"No such File object: {file_id[:100]}", param=param)
    return record


def file_object(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.content_bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.value["filename"],
        "purpose": record.tag,
        "status": "processed",
        "status_details": None,
    }


def check_expiry(anchor: str, seconds: int, *, param: str) -> int:
    """The seconds. Raises InvalidRequestError for what is no expiry policy of OpenAI's."""
    if anchor != "created_at":
        raise InvalidRequestError(
            f"{param}[anchor] must be 'created_at', got {anchor[:32]!r}.", param=param
        )
    if not SHORTEST <= seconds <= LONGEST:
        raise InvalidRequestError(
            f"{param}[seconds] must be from {SHORTEST} to {LONGEST}.", param=param
        )
    return seconds


async def _allowance(services: Services, store: Store) -> tuple[int, str]:
    """Bytes that a new file may have, and what is said to a larger one."""
    most = services.config.max_file_bytes
    left = max(0, services.config.data_limit - await store.bytes_used())
    if left < most:
        return left, (
            f"The file does not fit: {left} bytes of the server's --data-limit are left. Delete "
            "files that are not needed any more."
        )
    return most, (
        f"The file is larger than {most} bytes; split it, or start the server with a larger "
        "--max-file-bytes."
    )


def _record(file_id: str, upload: Upload) -> Record:
    """Raises for a form that lacks something, or asks for what is not done here."""
    purpose = upload.fields.get("purpose")
    if upload.filename is None or purpose is None:
        missing = "file" if upload.filename is None else "purpose"
        raise InvalidRequestError(
            f"{missing} is required.", param=missing, code="missing_required_parameter"
        )
    if upload.size == 0:
        raise InvalidRequestError("The file is empty.", param="file")
    if purpose != "batch":
        raise UnsupportedParameterError(
            f"purpose must be 'batch', got {purpose[:64]!r}: files serve as inputs of batches.",
            param="purpose",
        )
    seconds = DEFAULT
    if "expires_after[anchor]" in upload.fields or "expires_after[seconds]" in upload.fields:
        text = upload.fields.get("expires_after[seconds]", "")
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        anchor = upload.fields.get("expires_after[anchor]", "")
        seconds = check_expiry(anchor, number, param="expires_after")
    now = int(time.time())
    return Record(
        kind=FILE,
        id=file_id,
        value={"filename": upload.filename},
        tag=purpose,
        created_at=now,
        expires_at=now + seconds,
        content_bytes=upload.size,
    )


async def _batch_that_reads(store: Store, file_id: str) -> str | None:
    after = None
    while True:
        page = await store.page("batch", limit=100, after=after, tag="open")
        for batch in page.records:
            if batch.value["input_file_id"] == file_id:
                return batch.id
        if not page.has_more:
            return None
        after = page.records[-1].id
