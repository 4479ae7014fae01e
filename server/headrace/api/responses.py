"""/v1/responses: OpenAI's Responses API.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from headrace.api.error_response import json_response
from headrace.api.generation import Choice, TextDelta, new_id
from headrace.api.listing import page_of
from headrace.api.reply import server_timing
from headrace.api.responses_answer import ResponseAnswer, ending_event
from headrace.api.responses_background import BackgroundJob, kept_events
from headrace.api.responses_items import Item
from headrace.api.responses_output import event_bytes
from headrace.api.responses_prompt import question_prompt, read_question, start_answer
from headrace.api.responses_protocol import ResponsesRequest, check_included, receive
from headrace.api.responses_store import (
    RESPONSE,
    KeptResponses,
    cancelled,
    find,
    kept_responses,
    store_for,
)
from headrace.api.resume import HEADER, VERSION, Journal, first_line, head_line, line, no_journal
from headrace.api.services import Services, services_of
from headrace.api.streaming import EventStream, Outbox, SlowClientError, unless_disconnected
from headrace.errors import HeadraceError, InvalidRequestError, RequestError

logger = logging.getLogger(__name__)

router = APIRouter()

_ID = re.compile(r"resp_[0-9a-f]{24}")


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Input items in, output items out: text, reasoning and function calls."""
    services = services_of(request)
    response_id = new_id("resp").replace("-", "_")
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request)
        kept = _kept_for(body, services)
        journal = _journal(request, body)
        told_id = journal.head.id if journal and journal.head else response_id
        question = await read_question(request, body, told_id)
        turn = await start_answer(
            request,
            question,
            response_id,
            truncate=body.truncation == "auto",
            journal=journal,
        )

    def answer(emit: Any = None) -> ResponseAnswer:
        return ResponseAnswer(
            body,
            turn,
            question.ids,
            store=kept is not None,
            ignored_fields=ignored,
            origins=question.origins,
            emit=emit,
        )

    sampling = msgspec.json.encode(turn.generation.sampling_in_effect()).decode()
    headers = {"headrace-sampling": sampling}
    if body.background:
        assert kept is not None
        return await _in_background(request, body, kept, question.items, answer, headers)
    if body.stream:
        return _streamed(
            request, kept, question.items, answer, headers, journaled=journal is not None
        )
    made = answer()

    async def work() -> dict[str, Any]:
        return await _keep(kept, await made.run(), question.items)

    ended = await unless_disconnected(request.receive, work())
    if (timing := made.generation.usage.timing) is not None:
        headers["server-timing"] = server_timing(timing)
    response = json_response(ended)
    response.headers.update(headers)
    return response


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the model would see for the same body."""
    body, ignored = await receive(request)
    question = await read_question(request, body, new_id("resp").replace("-", "_"))
    prompt = await question_prompt(request, question)
    answer: dict[str, Any] = {
        "object": "response.input_tokens",
        "input_tokens": len(prompt.token_ids),
    }
    if ignored:
        answer["headrace"] = {"ignored_fields": ignored}
    return json_response(answer)


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request) -> Response:
    """As it is now; with stream=true the events of one made in the background, after
    starting_after."""
    services = services_of(request)
    query = request.query_params
    for name in (*query.getlist("include"), *query.getlist("include[]")):
        check_included(name, param="include")
    record = await find(request, services)
    if query.get("stream", "false") != "true":
        return json_response(record.value["response"])
    if not record.value["streamed"]:
        raise InvalidRequestError(
            "Only responses made with background: true and stream: true can be streamed again; "
            "leave stream out.",
            param="stream",
        )
    after = query.get("starting_after", "-1")
    if not (after.removeprefix("-").isascii() and after.removeprefix("-").isdigit()):
        raise InvalidRequestError(
            f"starting_after must be the number of an event, got {after[:32]!r}.",
            param="starting_after",
        )
    kept = store_for(services, "stream")
    # As fast as the client reads: all of it may be there already.
    return StreamingResponse(
        kept_events(kept, record.id, int(after[:10])),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request) -> Response:
    """Forgets a response; one that is still made ends."""
    services = services_of(request)
    record = await find(request, services)
    await services.kept().delete(RESPONSE, record.id)
    services.background.cancel(record.id)
    return json_response({"id": record.id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request) -> Response:
    """Ends a response that is made in the background."""
    services = services_of(request)
    record = await find(request, services)
    changed = await services.kept().update(RESPONSE, record.id, cancelled)
    services.background.cancel(record.id)
    return json_response((changed or record).value["response"])


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request) -> Response:
    """What the request held; not what it continued. `after`, `limit` and `order` turn pages."""
    record = await find(request, services_of(request))
    items = record.value["input"]
    return json_response(page_of(request, items, "item", default=20, maximum=100))


def _journal(request: Request, body: ResponsesRequest) -> Journal | None:
    """None where a stream cannot go on elsewhere: one in the background is kept here, and the last
    events tell log-probabilities again, which token ids do not."""
    if not body.stream or body.background or body.wants_logprobs:
        return None
    journal = Journal.of(request.headers, body.model_extra)
    if journal is not None and journal.head and not _ID.fullmatch(journal.head.id):
        raise no_journal("its id is not that of a response")
    return journal


def _kept_for(body: ResponsesRequest, services: Services) -> KeptResponses | None:
    """Where the response is to be kept. Raises for what needs that where it cannot be."""
    if body.background:
        if body.store is False:
            raise InvalidRequestError(
                "background needs store: true, for the answer is fetched later.", param="store"
            )
        return store_for(services, "background")
    if body.store is None:
        return kept_responses(services)
    return store_for(services, "store") if body.store else None


async def _keep(
    kept: KeptResponses | None, response: dict[str, Any], items: list[Item]
) -> dict[str, Any]:
    """A store that fails must not lose an answer that is there."""
    if kept is None:
        return response
    try:
        await kept.put(response, items)
    except Exception:
        logger.exception("Response %s cannot be kept", response["id"])
        return {**response, "store": False}
    return response


class _Events:
    """The events of one stream, numbered. With a journal each token is told with its first event,
    or on its own if it has none; what another server has sent is passed over."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._number = self._told = 0
        self._line = b""
        self._cached_is_due = False

    def journal_of(self, answer: ResponseAnswer) -> None:
        journal = answer.journal
        if journal is None:
            return
        self._told = journal.events
        self._cached_is_due = journal.cached_tokens is None
        self._line = b"" if journal.head else head_line(answer.head())
        answer.on_token = self._on_token

    def emit(self, kind: str, **fields: Any) -> None:
        if self._number >= self._told:
            self._outbox.put(self._line + event_bytes(kind, self._number, fields))
            self._line = b""
        self._number += 1

    def _on_token(self, choice: Choice, delta: TextDelta) -> None:
        if self._line:  # of a token without events
            self._outbox.put(self._line + b"\n")
        ending = choice.ending if delta.finish_reason else None
        if self._cached_is_due:
            self._cached_is_due = False
            self._line = first_line(delta.token_id, ending, choice.cached_tokens)
        else:
            self._line = line(choice.index, delta.token_id, ending)


def _streamed(
    request: Request,
    kept: KeptResponses | None,
    items: list[Item],
    answer: Callable[[Any], ResponseAnswer],
    headers: dict[str, str],
    *,
    journaled: bool,
) -> Response:
    async def produce(outbox: Outbox) -> None:
        events = _Events(outbox)
        made = answer(events.emit)
        events.journal_of(made)
        try:
            ended = await made.run()
        except (RequestError, SlowClientError):
            raise
        except HeadraceError as error:
            ended = made.failed(error)
        except Exception as error:
            logger.exception("Response %s: a bug", made.id)
            ended = made.failed(error)
        kind, fields = ending_event(await _keep(kept, ended, items))
        events.emit(kind, **fields)

    if journaled:
        headers[HEADER] = VERSION
    limit = services_of(request).config.max_unsent_bytes
    return EventStream(produce, max_unsent=limit, headers=headers)


async def _in_background(
    request: Request,
    body: ResponsesRequest,
    kept: KeptResponses,
    items: list[Item],
    answer: Callable[[Any], ResponseAnswer],
    headers: dict[str, str],
) -> Response:
    job = BackgroundJob(kept)
    made = answer(job.emit if body.stream else None)
    try:
        await job.accept(made, items, streamed=bool(body.stream))
    except BaseException:
        made.generation.close()
        raise
    services_of(request).background.start(made.id, job.run())
    if body.stream:

        async def produce(outbox: Outbox) -> None:
            async for event in job.events():
                outbox.put(event)

        limit = services_of(request).config.max_unsent_bytes
        return EventStream(produce, max_unsent=limit, headers=headers)
    response = json_response(made.object)
    response.headers.update(headers)
    return response
