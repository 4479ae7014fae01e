"""From the body of /v1/responses to a chat request: input, what it continues, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from headrace.api.chat import ChatPrompt, ChatTurn, chat_prompt, start_chat
from headrace.api.protocol import ChatCompletionRequest
from headrace.api.responses_items import Item, ItemIds, input_items
from headrace.api.responses_protocol import ResponsesRequest, own_terms
from headrace.api.responses_store import conversation_before, is_reference, store_for
from headrace.api.resume import Journal
from headrace.api.services import services_of
from headrace.errors import ContextLengthExceededError


@dataclass(frozen=True, slots=True)
class Question:
    """What a response is to answer."""

    items: list[Item]
    """Of this input alone."""
    ids: ItemIds
    """For the items to come."""
    chat: ChatCompletionRequest
    origins: list[str]
    """For each message the field that it was made from."""


async def read_question(request: Request, body: ResponsesRequest, response_id: str) -> Question:
    """Raises a RequestError that names the field."""
    services = services_of(request)
    conversation = await conversation_before(services, body.previous_response_id, body.instructions)
    given = body.input
    if isinstance(given, list):
        referring = (index for index, item in enumerate(given) if is_reference(item))
        if (first := next(referring, None)) is not None:
            given = await store_for(services, f"input[{first}]").with_references(given)
    ids = ItemIds(response_id)
    items = input_items(given, ids)
    conversation.add(items, "input" if isinstance(given, str) else "input[{}]")
    origins = conversation.origins
    with own_terms(origins):
        return Question(items, ids, body.chat(conversation.messages), origins)


async def start_answer(
    request: Request,
    question: Question,
    response_id: str,
    *,
    truncate: bool,
    journal: Journal | None = None,
) -> ChatTurn:
    """Have the engine answer. `truncate`: without the oldest turns, if all do not fit."""
    with own_terms(question.origins):
        try:
            return await start_chat(request, question.chat, response_id, journal=journal)
        except ContextLengthExceededError:
            if not truncate:
                raise
        fitting = await _newest_turns(request, question.chat)
        return await start_chat(request, fitting, response_id, journal=journal)


async def question_prompt(request: Request, question: Question) -> ChatPrompt:
    with own_terms(question.origins):
        return await chat_prompt(request, question.chat)


async def _newest_turns(request: Request, chat: ChatCompletionRequest) -> ChatCompletionRequest:
    """As many of the newest turns as leave the output its room, but at least the last one. A turn
    begins with a message of the user; instructions always stay."""
    _, info = services_of(request).models.find(chat.model).loaded()
    room = info.max_model_len - max(chat.max_completion_tokens or 1, 1)
    cuts = [i for i, message in enumerate(chat.messages) if message.role == "user"][1:]
    if not cuts:
        return chat

    async def fits(cut: int) -> bool:
        try:
            prompt = await chat_prompt(request, _since(chat, cut))
        except ContextLengthExceededError:
            return False
        return len(prompt.token_ids) <= room

    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(cuts[middle]):
            high = middle
        else:
            low = middle + 1
    return _since(chat, cuts[low])


def _since(chat: ChatCompletionRequest, cut: int) -> ChatCompletionRequest:
    stays = [
        message
        for index, message in enumerate(chat.messages)
        if index >= cut or message.role in ("system", "developer")
    ]
    return chat.model_copy(update={"messages": stays})
