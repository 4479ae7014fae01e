"""Prompts to token ids, checked against the context, off the event loop when long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.api.generation import check_length
from headrace.engine.client import ModelInfo
from headrace.errors import ContextLengthExceededError, InvalidRequestError
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

T = TypeVar("T")

# About 2 ms of work: what the event loop, and with it every stream, may stand still.
MAX_INLINE_CHARACTERS = 16_384


async def encode_chat(
    text: TextProcessor,
    messages: Sequence[Mapping[str, Any]],
    info: ModelInfo,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The conversation, in which `tools` may be called, as token ids. Raises a RequestError for
    what the template or the context cannot take."""
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message

    def encode() -> list[int]:
        prompt = text.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
        )
        _check_size(text.tokenizer, prompt, info.max_model_len, param="messages")
        return text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    size = sum(map(_characters, messages))
    if tools:
        size += len(msgspec.json.encode(tools))
    return await _off_loop_if_long(encode, size)


async def encode_prompt(
    text: TextProcessor,
    prompt: str | list[str] | list[int] | list[list[int]],
    info: ModelInfo,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The prompts of a completion request as token ids; one prompt gives a list of one."""
    texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
    if texts:

        def encode() -> list[list[int]]:
            for one in texts:
                _check_size(text.tokenizer, one, info.max_model_len, param="prompt")
            if len(texts) == 1:
                return [text.tokenizer.encode(texts[0], add_special_tokens=add_special_tokens)]
            return text.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

        return await _off_loop_if_long(encode, sum(map(len, texts)))
    batches = [p for p in prompt if isinstance(p, list)]
    prompts = batches or [[p for p in prompt if isinstance(p, int)]]
    for token_ids in prompts:
        if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
            raise InvalidRequestError(
                f"prompt holds token ids outside 0 to {info.vocab_size - 1}, the vocabulary of "
                "this model.",
                param="prompt",
            )
    return prompts


def check_lengths(
    prompts: Sequence[list[int]], max_tokens: int | None, info: ModelInfo, *, param: str
) -> None:
    for prompt in prompts:
        check_length(len(prompt), max_tokens, info.max_model_len, param=param)


async def _off_loop_if_long(work: Callable[[], T], characters: int) -> T:
    return await asyncio.to_thread(work) if characters > MAX_INLINE_CHARACTERS else work()


def _characters(message: Mapping[str, Any]) -> int:
    texts = sum(len(value) for value in message.values() if isinstance(value, str))
    calls = message.get("tool_calls") or ()
    return texts + sum(len(call["function"]["arguments"]) for call in calls)


def _check_size(tokenizer: Tokenizer, prompt: str, limit: int, *, param: str) -> None:
    """Refuse a hopelessly long text before the work of tokenizing it."""
    if len(prompt) <= limit:  # a token has at least one character, with rare exceptions
        return
    fewest = -(-len(prompt) // tokenizer.longest_token)
    if fewest > limit:
        raise ContextLengthExceededError(
            f"This model's context is {limit} tokens, and the prompt has at least {fewest}. "
            "Shorten the prompt.",
            param=param,
        )
