"""POST /v1/chat/completions: messages in, one assistant message per choice out.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from headrace.api import logprobs
from headrace.api.body import receive
from headrace.api.generation import Choice, Generation, RequestContext, TextDelta, new_id, start
from headrace.api.prompts import check_lengths, encode_chat
from headrace.api.protocol import ChatCompletionRequest, plain_messages
from headrace.api.reply import Reply
from headrace.api.services import services_of


async def create_chat_completion(request: Request) -> Response:
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, ChatCompletionRequest)
        body.check_combinations()
        model = services.models.find(body.model)
        text, info = model.loaded()
        sampling = body.sampling()
        prompt = await encode_chat(
            text,
            plain_messages(body.messages),
            info,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            kwargs=body.chat_template_kwargs,
        )
        check_lengths([prompt], sampling.max_tokens, info, param="messages")
        context = RequestContext.of(request, body, new_id("chatcmpl"))
        generation = start(model, [prompt], sampling, context)
    reply = ChatReply(
        body,
        response_id=context.response_id,
        model=model,
        tokenizer=text.tokenizer,
        ignored_fields=ignored,
    )
    return await reply.send(request, generation)


class ChatReply(Reply):
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatCompletionRequest, **frame: Any) -> None:
        super().__init__(body, **frame)
        self._top_logprobs = (body.top_logprobs or 0) if body.logprobs else None

    def choice(self, choice: Choice, deltas: list[TextDelta]) -> dict[str, Any]:
        shaped: dict[str, Any] = {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": "".join(delta.text for delta in deltas),
                "refusal": None,
            },
            "logprobs": self._logprobs(deltas),
            "finish_reason": choice.finish_reason,
        }
        if self._token_ids:
            shaped["token_ids"] = [delta.token_id for delta in deltas if delta.token_id is not None]
        return shaped

    def chunk_choice(self, choice: Choice, delta: TextDelta, *, first: bool) -> dict[str, Any]:
        """The role comes with the first token, so that an event is a token."""
        role = {"role": "assistant"} if first else {}
        shaped: dict[str, Any] = {
            "index": choice.index,
            "delta": {**role, "content": delta.text},
            "logprobs": self._logprobs([delta]),
            "finish_reason": delta.finish_reason,
        }
        if self._token_ids:
            shaped["token_ids"] = [] if delta.token_id is None else [delta.token_id]
        return shaped

    def extras(self, generation: Generation) -> dict[str, Any]:
        extras = super().extras(generation)
        first = generation.choices[0]
        if self._token_ids:
            extras["prompt_token_ids"] = first.prompt_token_ids
        if first.prompt_logprobs is not None:
            extras["prompt_logprobs"] = logprobs.prompt_entries(
                self._tokenizer, first.prompt_token_ids, first.prompt_logprobs
            )
        return extras

    def _logprobs(self, deltas: list[TextDelta]) -> dict[str, Any] | None:
        if self._top_logprobs is None:
            return None
        content = [
            logprobs.chat_entry(self._tokenizer, delta.token_id, delta.logprobs, self._top_logprobs)
            for delta in deltas
            if delta.token_id is not None and delta.logprobs is not None
        ]
        return {"content": content, "refusal": None}
