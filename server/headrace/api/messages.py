"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API.

A body becomes a chat request (messages_input.py), the answer content blocks (messages_output.py).
Any anthropic-version is taken, and any anthropic-beta: what a beta adds are fields, and those are
judged one by one.
"""

from __future__ import annotations

import secrets
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from headrace.api.body import parse_json, read_body
from headrace.api.chat import chat_prompt, start_chat
from headrace.api.error_response import json_response
from headrace.api.field_policy import check_extra_fields
from headrace.api.messages_input import chat_request
from headrace.api.messages_output import MessageReply
from headrace.api.messages_protocol import HARMLESS, REFUSED, CountTokensRequest, MessagesRequest
from headrace.api.resume import FIELD, Journal, is_journaled
from headrace.api.services import services_of

router = APIRouter()

Body = TypeVar("Body", bound=CountTokensRequest)


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    """Anthropic's Messages API: a conversation in, the assistant's message out."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await _receive(request, MessagesRequest)
        journal = Journal.of(request.headers, body.model_extra) if body.stream else None
        text, _ = services.models.find(body.model).loaded()
        chat = chat_request(body, text)
        response_id = f"msg_{secrets.token_hex(12)}"
        turn = await start_chat(request, chat, response_id, limit_to_context=True, journal=journal)
    return await MessageReply(turn, body, ignored).send(request)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """The tokens of the prompt that such a request makes."""
    body, _ = await _receive(request, CountTokensRequest)
    text, _ = services_of(request).models.find(body.model).loaded()
    prompt = await chat_prompt(request, chat_request(body, text))
    return json_response({"input_tokens": len(prompt.token_ids)})


async def _receive(request: Request, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body and the names of its unknown fields."""
    config = services_of(request).config
    harmless = {**HARMLESS, FIELD: ""} if is_journaled(request.headers) else HARMLESS
    body = parse_json(kind, await read_body(request, config.max_body_bytes))
    ignored = check_extra_fields(
        body.model_extra,
        strict=config.strict_fields or bool(body.strict_fields),
        known=kind.model_fields,
        harmless=harmless,
        refused=REFUSED,
    )
    return body, ignored
