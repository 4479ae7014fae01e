"""Prompts to token ids, checked against the context, off the event loop when long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from headrace.api.protocol import ChatCompletionRequest, CompletionRequest
from headrace.engine.client import ModelInfo
from headrace.errors import ContextLengthExceededError, InvalidRequestError
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

T = TypeVar("T")

# About 2 ms of work: what the event loop, and with it every stream, may stand still.
MAX_INLINE_CHARACTERS = 16_384

# What a message costs to render, however short it is, in characters of text.
MESSAGE_CHARACTERS = 32

# Characters beyond those that a truncated prompt can need, so that the border does not show.
TRUNCATION_MARGIN = 64


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a prompt that is too long is cut to."""

    keep: int
    """Tokens."""
    keeps_end: bool

    @classmethod
    def of(
        cls, body: ChatCompletionRequest | CompletionRequest, info: ModelInfo
    ) -> Truncation | None:
        """None if `body` does not ask for it. -1 leaves the output its room, or one token."""
        keep = body.truncate_prompt_tokens
        if not keep:
            return None
        if keep == -1:
            keep = info.max_model_len - max(body.sampling().max_tokens or 1, 1)
        return cls(max(keep, 1), keeps_end=body.truncation_side != "right")

    def text(self, text: str, tokenizer: Tokenizer) -> str:
        """The part of `text` that the kept tokens can stand for: only that is tokenized."""
        most = self.keep * tokenizer.longest_token + TRUNCATION_MARGIN
        return text[-most:] if self.keeps_end else text[:most]

    def token_ids(self, token_ids: list[int]) -> list[int]:
        return token_ids[-self.keep :] if self.keeps_end else token_ids[: self.keep]


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
    truncation: Truncation | None = None,
    off_loop: bool = False,
) -> list[int]:
    """The conversation, in which `tools` may be called, as token ids. `off_loop`: never on the
    event loop, however short. Raises a RequestError for what the template or the context cannot
    take."""
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
        if truncation is not None:
            prompt = truncation.text(prompt, text.tokenizer)
            token_ids = text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            return truncation.token_ids(token_ids)
        _check_size(text.tokenizer, prompt, info.max_model_len, param="messages")
        return text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    size = sum(map(_characters, messages)) + MESSAGE_CHARACTERS * len(messages)
    for more in (tools, kwargs):
        if more:
            size += len(msgspec.json.encode(more))
    return await _off_loop_if_long(encode, MAX_INLINE_CHARACTERS + 1 if off_loop else size)


async def encode_prompt(
    text: TextProcessor,
    prompt: str | list[str] | list[int] | list[list[int]],
    info: ModelInfo,
    *,
    add_special_tokens: bool = True,
    truncation: Truncation | None = None,
) -> list[list[int]]:
    """The prompts of a completion request as token ids; one prompt gives a list of one."""
    if truncation is not None:
        prompts = await _encode_all(text, prompt, info, truncation, add_special_tokens)
        return [truncation.token_ids(token_ids) for token_ids in prompts]
    return await _encode_all(text, prompt, info, None, add_special_tokens)


async def _encode_all(
    text: TextProcessor,
    prompt: str | list[str] | list[int] | list[list[int]],
    info: ModelInfo,
    truncation: Truncation | None,
    add_special_tokens: bool,
) -> list[list[int]]:
    texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
    if texts:
        if truncation is not None:
            texts = [truncation.text(one, text.tokenizer) for one in texts]

        def encode() -> list[list[int]]:
            for one in texts:
                if truncation is None:
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
        _check_length(len(prompt), max_tokens, info.max_model_len, param=param)


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
            f"This model's maximum context length is {limit} tokens, and the prompt has at least "
            f"{fewest}. Shorten the prompt.",
            param=param,
        )


def _check_length(
    num_prompt_tokens: int, max_tokens: int | None, limit: int, *, param: str
) -> None:
    """Raises if prompt and output do not fit a context of `limit` tokens."""
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt has no tokens; give it some text.", param=param)
    if num_prompt_tokens >= limit:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {limit} tokens, and the prompt alone has "
            f"{num_prompt_tokens}; at least one must be left for the output. Shorten the prompt.",
            param=param,
        )
    if max_tokens is not None and num_prompt_tokens + max_tokens > limit:
        raise ContextLengthExceededError(
            f"This model's maximum context length is {limit} tokens, and the request asks for "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} "
            f"for the output). Shorten the prompt, or ask for at most "
            f"{limit - num_prompt_tokens} output tokens.",
            param=param,
        )
