"""POST /v1/chat/completions: messages in, one assistant message per choice out.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from headrace.api import logprobs
from headrace.api.answer_grammar import answer_grammar
from headrace.api.beam_generation import begin
from headrace.api.beam_search import beam_settings
from headrace.api.body import receive
from headrace.api.chat_message import ChoiceMessage, MessageReader, message_reader, text_fields
from headrace.api.generation import (
    Choice,
    Generation,
    RequestContext,
    TextDelta,
    Usage,
    new_id,
)
from headrace.api.legacy_functions import (
    FunctionMessage,
    own_names,
    uses_functions,
    with_tools,
)
from headrace.api.model_table import ServedModel
from headrace.api.prompts import Truncation, check_lengths, encode_chat
from headrace.api.protocol import ChatCompletionRequest, plain_messages
from headrace.api.reasoning import template_kwargs, thinking_budget
from headrace.api.reply import Reply
from headrace.api.resume import Journal
from headrace.api.services import services_of
from headrace.api.structured_output import make_output_grammar
from headrace.api.template_fields import text_for, with_documents
from headrace.api.tools import ToolUse, tool_use
from headrace.engine.client import Task
from headrace.text.processor import TextProcessor


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A chat request that the engine has taken."""

    body: ChatCompletionRequest
    model: ServedModel
    text: TextProcessor
    reader: MessageReader | None
    """None where the text of a choice is its content, and nothing else."""
    context: RequestContext
    generation: Generation
    constrained: bool
    """By a grammar, which the engine may still refuse: as an error before the first delta."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat request as the model is to see it."""

    model: ServedModel
    tools: ToolUse | None
    token_ids: list[int]


async def chat_prompt(request: Request, body: ChatCompletionRequest) -> ChatPrompt:
    """Check, render and tokenize; nothing is submitted.

    Raises what is wrong with the body. Whether the prompt leaves room for an output is checked by
    `start_chat`, but a text that is hopelessly long is refused here.
    """
    body.check_combinations()
    services = services_of(request)
    model = services.models.find(body.model)
    text, info = model.loaded_for(Task.GENERATE)
    text = await text_for(body, text, trusted=services.config.trust_request_chat_template)
    use = tool_use(body, text.tool_calls)
    token_ids = await encode_chat(
        text,
        plain_messages(body.messages),
        info,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        tools=use.tools if use else (),
        kwargs=with_documents(
            body, template_kwargs(body.chat_template_kwargs, body.reasoning_effort, text)
        ),
        off_loop=body.chat_template is not None,
        truncation=Truncation.of(body, info),
    )
    return ChatPrompt(model, use, token_ids)


async def start_chat(
    request: Request,
    body: ChatCompletionRequest,
    response_id: str,
    *,
    limit_to_context: bool = False,
    journal: Journal | None = None,
) -> ChatTurn:
    """Render, tokenize and submit. What other APIs ask for in messages becomes such a body, too.

    `limit_to_context`: a max_tokens beyond what the context holds is no error. `journal`: of the
    body that this one was made from.
    Raises what is wrong with the body, or what EngineClient.submit raises; then nothing is left
    submitted. Call it within `Services.counting_rejections`.
    """
    sampling = body.sampling()
    beams = beam_settings(body, sampling, stream=bool(body.stream))
    prompt = await chat_prompt(request, body)
    text, info = prompt.model.loaded()
    room = info.max_model_len - len(prompt.token_ids)
    if limit_to_context and room < (sampling.max_tokens or 0):
        sampling = dataclasses.replace(sampling, max_tokens=max(room, 1))
    check_lengths([prompt.token_ids], sampling.max_tokens, info, param="messages")
    context = RequestContext.of(request, body, response_id)
    if journal is not None:
        context = dataclasses.replace(context, journal=journal)
    content = await make_output_grammar(body, sampling)
    use = prompt.tools and prompt.tools.beside(format_is_asked_for=content is not None)
    reader = message_reader(body, text, prompt.token_ids, use)
    grammar = answer_grammar(content, reader, sampling, text.tokenizer)
    shown = text.tokenizer.special_ids_of(reader.markers) if reader else frozenset[int]()
    thinking = thinking_budget(
        body.thinking_token_budget,
        text.reasoning,
        text.tokenizer,
        begun=reader is not None and reader.begun,
    )
    generation = begin(
        prompt.model,
        [prompt.token_ids],
        sampling,
        context,
        beams,
        shown=shown,
        grammar=grammar,
        thinking=thinking,
    )
    constrained = grammar is not None
    return ChatTurn(body, prompt.model, text, reader, context, generation, constrained)


async def create_chat_completion(request: Request) -> Response:
    """Messages in, an assistant message for each choice out."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, ChatCompletionRequest)
        message_type = ChoiceMessage
        if uses_functions(body):
            message_type = FunctionMessage
            with own_names():
                turn = await start_chat(request, with_tools(body), new_id("chatcmpl"))
        else:
            turn = await start_chat(request, body, new_id("chatcmpl"))
    reply = ChatReply(
        turn.body,
        turn.reader,
        message_type,
        response_id=turn.context.response_id,
        model=turn.model,
        tokenizer=turn.text.tokenizer,
        ignored_fields=ignored,
        journal=turn.context.journal,
    )
    return await reply.send(request, turn.generation)


class ChatReply(Reply):
    """`reader`: None where the text of a choice is its content, and nothing else."""

    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    begins_in_order = True

    def __init__(
        self,
        body: ChatCompletionRequest,
        reader: MessageReader | None = None,
        message_type: type[ChoiceMessage] = ChoiceMessage,
        **frame: Any,
    ) -> None:
        super().__init__(body, **frame)
        self._top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._reader = reader
        self._message_type = message_type
        self._messages: dict[int, ChoiceMessage] = {}
        self._echo = echo_of(body)

    def read(self, choice: Choice, delta: TextDelta) -> TextDelta:
        return delta if self._reader is None else self._message_of(choice).read(delta)

    def choice(self, choice: Choice, deltas: list[TextDelta]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        finish_reason = choice.finish_reason
        if self._reader is None:
            message["content"] = "".join(delta.text for delta in deltas)
        else:
            fields, finish_reason = self._message_of(choice).whole(deltas)
            message |= fields
        if self._echo:
            message["content"] = self._echo + (message["content"] or "")
        shaped: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(deltas),
            "finish_reason": finish_reason,
        }
        if self._token_ids:
            shaped["token_ids"] = [delta.token_id for delta in deltas if delta.token_id is not None]
        return shaped

    def chunk_choice(self, choice: Choice, delta: TextDelta, *, first: bool) -> dict[str, Any]:
        """The role comes with the first token, so that an event is a token."""
        fields = {"role": "assistant"} if first else {}
        if delta.kind is not None:
            fields |= text_fields(delta.kind, delta.text)
        else:
            fields |= self._message_of(choice).fields(delta.pieces)
        if first and self._echo:
            fields["content"] = self._echo + fields.get("content", "")
        shaped: dict[str, Any] = {
            "index": choice.index,
            "delta": fields,
            "logprobs": self._logprobs([delta]),
            "finish_reason": delta.finish_reason,
        }
        if self._token_ids:
            shaped["token_ids"] = [] if delta.token_id is None else [delta.token_id]
        return shaped

    def usage(self, generation: Generation) -> Usage:
        usage = super().usage(generation)
        if self._reader is None or not self._reader.tells_reasoning:
            return usage
        return usage._replace(reasoning_tokens=sum(m.thought for m in self._messages.values()))

    def extras(self, generation: Generation) -> dict[str, Any]:
        extras = super().extras(generation)
        prompt = generation.choices[0].prompt_token_ids
        if self._token_ids:
            extras["prompt_token_ids"] = prompt
        for choice in generation.choices:  # in a stream any of them may be the first
            if choice.prompt_logprobs is not None:
                entries = logprobs.prompt_entries(self._tokenizer, prompt, choice.prompt_logprobs)
                extras["prompt_logprobs"] = entries
                break
        return extras

    def _logprobs(self, deltas: list[TextDelta]) -> dict[str, Any] | None:
        if self._top_logprobs is None:
            return None
        content = [
            logprobs.chat_entry(
                self._tokenizer,
                delta.token_id,
                delta.logprobs,
                self._top_logprobs,
                as_ids=self._tokens_as_ids,
            )
            for delta in deltas
            if delta.token_id is not None and delta.logprobs is not None
        ]
        return {"content": content, "refusal": None}

    def _message_of(self, choice: Choice) -> ChoiceMessage:
        assert self._reader is not None
        message = self._messages.get(choice.index)
        if message is None:
            text = self._reader.message_text()
            message = self._message_type(text, named=self._reader.names_function)
            self._messages[choice.index] = message
        return message


def echo_of(body: ChatCompletionRequest) -> str:
    """As in vLLM: the last message, where it is the assistant's and the answer goes on from it."""
    last = plain_messages(body.messages[-1:])[0] if body.echo else {}
    return str(last["content"]) if last.get("role") == "assistant" else ""
