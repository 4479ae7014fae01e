"""Responses that are kept: found again, listed, continued, and forgotten in time.

One record a response, under its id: the object as clients see it, and its own input items. What a
response continues is in the records of those before it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any

from fastapi import Request

from headrace.api.responses_answer import ENDED, failed_object
from headrace.api.responses_items import Conversation, Item, response_of
from headrace.api.services import Services
from headrace.api.store import LeaseLostError, Record, Store
from headrace.errors import (
    EngineError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedParameterError,
)

RESPONSE = "response"
KEPT_SECONDS = 30 * 24 * 3600
MAX_TURNS = 4096
"""Responses that one conversation may consist of."""
MAX_REFERENCED = 256
"""Responses whose items one input may refer to."""
_PUTS_PER_TRIM = 32
_NO_STORE = "This server keeps no responses"


class KeptResponses:
    """`limit`: the newest so many are kept, give or take a few; `data_limit`: bytes that the whole
    store may take before older responses go."""

    def __init__(self, store: Store, *, limit: int, data_limit: int) -> None:
        self.store = store
        self._limit = limit
        self._data_limit = data_limit

    async def put(
        self, response: dict[str, Any], items: list[Item], *, streamed: bool = False
    ) -> None:
        """`items`: of its own input. `streamed`: its events are kept, too."""
        await self.store.put(
            Record(
                kind=RESPONSE,
                id=response["id"],
                value={"response": response, "input": items, "streamed": streamed},
                created_at=response["created_at"],
                expires_at=response["created_at"] + KEPT_SECONDS,
            )
        )
        if secrets.randbelow(_PUTS_PER_TRIM) == 0:
            await self._trim()

    async def _trim(self) -> None:
        keep = self._limit
        await self.store.trim(RESPONSE, keep=keep)
        while keep and await self.store.bytes_used() > self._data_limit:
            keep //= 2
            await self.store.trim(RESPONSE, keep=keep)

    async def get(self, response_id: str) -> Record:
        """The record as it is now: a response that nobody works on any more has failed. Raises
        NotFoundError."""
        record = await self.store.get(RESPONSE, response_id)
        if record is None:
            raise NotFoundError(
                f"Response with id '{response_id[:100]}' not found.", param="response_id"
            )
        if record.value["response"]["status"] in ENDED:
            return record
        # Whoever works on it holds its lease.
        finder = secrets.token_hex(8)
        if not await self.store.lease(RESPONSE, response_id, finder, 1.0):
            return record
        try:
            abandoned = await self.store.update(RESPONSE, response_id, _abandoned, owner=finder)
        except LeaseLostError:
            return record
        return abandoned or record

    async def conversation(self, response_id: str) -> list[Item]:
        """All items of the conversation that ends with this response, output included. Raises
        InvalidRequestError if it cannot be continued."""
        turns: list[list[Item]] = []
        next_id: str | None = response_id
        while next_id is not None:
            try:
                value = (await self.get(next_id)).value
            except NotFoundError:
                raise _not_continued(
                    f"Previous response with id '{next_id[:100]}' not found.",
                    "previous_response_not_found",
                ) from None
            response = value["response"]
            if response["status"] not in ("completed", "incomplete"):
                raise _not_continued(
                    f"The response '{next_id}' is {response['status']}; only one that is complete "
                    "can be continued."
                )
            turns.append([*value["input"], *response["output"]])
            if len(turns) > MAX_TURNS:
                raise _not_continued(
                    f"The conversation has more than {MAX_TURNS} responses; send the part that "
                    "matters as input."
                )
            next_id = response["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    async def with_references(self, items: list[Item]) -> list[Item]:
        """Input items, with those in place of references that they refer to."""
        found: dict[str, dict[str, Item]] = {}
        resolved = []
        for index, item in enumerate(items):
            if not is_reference(item):
                resolved.append(item)
                continue
            where = f"input[{index}].id"
            item_id = item.get("id")
            source = response_of(item_id) if isinstance(item_id, str) else None
            if source is not None and source not in found:
                if len(found) == MAX_REFERENCED:
                    raise InvalidRequestError(
                        f"input refers to more than {MAX_REFERENCED} responses; send the items.",
                        param=where,
                    )
                record = await self.store.get(RESPONSE, source)
                listed: list[Item] = []
                if record is not None:
                    listed = [*record.value["input"], *record.value["response"]["output"]]
                found[source] = {one["id"]: one for one in listed}
            referred = found[source].get(str(item_id)) if source is not None else None
            if referred is None:
                raise NotFoundError(
                    f"{where}: there is no item {str(item_id)[:100]!r}; items of responses with "
                    "store: false are not kept. Send the item.",
                    param=where,
                )
            resolved.append(referred)
        return resolved


def is_reference(item: Item) -> bool:
    """Its type may be left out."""
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "role" not in item and "id" in item)


def kept_responses(services: Services) -> KeptResponses | None:
    """None where none are kept."""
    config = services.config
    if services.store is None or config.max_stored_responses == 0:
        return None
    return KeptResponses(
        services.store, limit=config.max_stored_responses, data_limit=config.data_limit
    )


def store_for(services: Services, param: str) -> KeptResponses:
    """Raises UnsupportedParameterError for the field that needs it where none are kept."""
    kept = kept_responses(services)
    if kept is None:
        raise UnsupportedParameterError(
            f"{param} is not supported: {_no_store(services)}", param=param
        )
    return kept


async def find(request: Request, services: Services) -> Record:
    """The response that the path names. Raises NotFoundError."""
    response_id: str = request.path_params["response_id"]
    kept = kept_responses(services)
    if kept is None:
        raise NotFoundError(
            f"Response with id '{response_id[:100]}' not found: {_no_store(services)}",
            param="response_id",
        )
    return await kept.get(response_id)


async def conversation_before(
    services: Services, previous_response_id: str | None, instructions: str | None
) -> Conversation:
    """What stands before the input."""
    conversation = Conversation()
    if instructions:
        conversation.instruct(instructions)
    if previous_response_id is not None:
        kept = store_for(services, "previous_response_id")
        items = await kept.conversation(previous_response_id)
        conversation.add(items, "previous_response_id")
    return conversation


def _no_store(services: Services) -> str:
    if services.store is None:
        return f"{_NO_STORE}. {services.store_problem}"
    return f"{_NO_STORE}: it was started with --max-stored-responses 0."


def _abandoned(record: Record) -> Record:
    response = record.value["response"]
    if response["status"] in ENDED:
        return record
    error = EngineError("The server that worked on this response has ended; send it again.")
    return with_response(record, failed_object(response, error))


def with_response(record: Record, response: dict[str, Any]) -> Record:
    return replace(record, value={**record.value, "response": response})


def cancelled(record: Record) -> Record:
    """Raises InvalidRequestError for what cannot be cancelled any more."""
    response = record.value["response"]
    if not response["background"]:
        raise InvalidRequestError(
            "Only responses with background: true can be cancelled; end others by closing the "
            "connection.",
            param="response_id",
        )
    if response["status"] == "cancelled":
        return record
    if response["status"] in ENDED:
        raise InvalidRequestError(
            f"Cannot cancel a response with status {response['status']!r}.", param="response_id"
        )
    return with_response(
        record, {**response, "status": "cancelled", "cancelled_at": int(time.time())}
    )


def _not_continued(message: str, code: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(message, param="previous_response_id", code=code)
