"""What the two kinds of completion share: one JSON answer, or a stream of events, around choices.

chat.py and completions.py say what a choice looks like.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import Request, Response

from headrace.api.generation import Choice, Generation, TextDelta, Timing, Usage
from headrace.api.model_table import ServedModel
from headrace.api.protocol import ChatCompletionRequest, CompletionRequest
from headrace.api.resume import HEADER, VERSION, Head, Journal, line, token_line, usage_line
from headrace.api.services import services_of
from headrace.api.streaming import DONE, EventStream, Outbox, unless_disconnected
from headrace.text.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode
_TEXT_GOES_HERE = "\x00text\x00"


class Reply(ABC):
    """The answer to one request."""

    answer_object: ClassVar[str]
    chunk_object: ClassVar[str]
    begins_in_order: ClassVar[bool] = False
    """In a stream no choice begins before those of lower index: clients put them into a list."""

    def __init__(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        *,
        response_id: str,
        model: ServedModel,
        tokenizer: Tokenizer,
        ignored_fields: list[str],
        journal: Journal | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = bool(body.stream)
        self._final_usage = body.wants_usage
        self._running_usage = body.wants_running_usage
        self._token_ids = bool(body.return_token_ids)
        self._tokens_as_ids = bool(body.return_tokens_as_token_ids)
        self._has_logprobs = body.logprobs is not None and body.logprobs is not False
        self._ignored_fields = ignored_fields
        self._journal = journal
        head = journal.head if journal else None
        self._envelope: dict[str, Any] = {
            "id": head.id if head else response_id,
            "object": self.chunk_object if self._stream else self.answer_object,
            "created": head.created if head else int(time.time()),
            "model": body.model or model.name,
            "system_fingerprint": model.fingerprint,
        }

    def read(self, choice: Choice, delta: TextDelta) -> TextDelta:
        """What is in the text of a delta of a stream. Called once for each, in order."""
        return delta

    @abstractmethod
    def choice(self, choice: Choice, deltas: list[TextDelta]) -> dict[str, Any]:
        """A finished choice, from all its deltas."""

    @abstractmethod
    def chunk_choice(self, choice: Choice, delta: TextDelta, *, first: bool) -> dict[str, Any]:
        """The choice in the event of one token. `first`: of this choice."""

    def extras(self, generation: Generation) -> dict[str, Any]:
        """Fields beside the choices: in the answer, or in the first event."""
        if self._ignored_fields:
            return {"headrace": {"ignored_fields": self._ignored_fields}}
        return {}

    def usage(self, generation: Generation) -> Usage:
        return generation.usage

    async def send(self, request: Request, generation: Generation) -> Response:
        """Run `generation` and answer with it. The generation ends if the client goes away."""
        headers = {"headrace-sampling": _encode(generation.sampling_in_effect()).decode()}
        if not self._stream:
            answer = await unless_disconnected(request.receive, self.answer(generation))
            headers |= prompt_header(generation.usage)
            if (timing := generation.usage.timing) is not None:
                headers["server-timing"] = server_timing(timing)
            return Response(_encode(answer), headers=headers, media_type="application/json")

        async def produce(outbox: Outbox) -> None:
            events = _Events(self, generation, journal)
            events.resume()
            await generation.run(lambda choice, deltas: outbox.put(events.of(choice, deltas)))
            if self._final_usage and not events.usage_is_told:
                outbox.put(events.usage())
            outbox.put(DONE)

        journal = self._journal
        if journal is not None:
            headers[HEADER] = VERSION
        limit = services_of(request).config.max_unsent_bytes
        return EventStream(
            produce,
            max_unsent=limit,
            headers=headers,
            first_known=lambda: prompt_header(generation.usage),
        )

    async def answer(self, generation: Generation) -> dict[str, Any]:
        """The whole answer, when the generation has ended."""
        deltas: dict[int, list[TextDelta]] = {choice.index: [] for choice in generation.choices}
        await generation.run(lambda choice, more: deltas[choice.index].extend(more))
        return {
            **self._envelope,
            "choices": [self.choice(choice, deltas[choice.index]) for choice in generation.choices],
            "usage": usage_object(self.usage(generation)),
            **self.extras(generation),
        }

    def chunk(self, choices: list[dict[str, Any]], generation: Generation) -> dict[str, Any]:
        """An event. With include_usage all but the last have a usage of null, as OpenAI's do."""
        chunk: dict[str, Any] = {**self._envelope, "choices": choices}
        if self._running_usage:
            chunk["usage"] = usage_object(self.usage(generation))
        elif self._final_usage:
            chunk["usage"] = None
        return chunk

    def head(self, generation: Generation) -> Head:
        """What a stream that goes on elsewhere must not change."""
        return Head(
            id=self._envelope["id"],
            created=self._envelope["created"],
            seed=generation.seed,
            fingerprint=self._envelope["system_fingerprint"],
            cached_tokens=generation.usage.cached_tokens,
        )

    @property
    def differs_in_text_only(self) -> bool:
        """Whether a choice's events, but for the first and the last, have only their text."""
        return not (self._running_usage or self._token_ids or self._has_logprobs)


class _Events:
    """The events of one stream: one per token, the first with the role, the last with the
    finish_reason. Nearly all differ in their text only: the JSON around it is made once.

    With a journal each says which token it stands for."""

    def __init__(self, reply: Reply, generation: Generation, journal: Journal | None) -> None:
        self._reply = reply
        self._generation = generation
        self._journal = journal
        self._begun: set[int] = set()
        self._around_text: dict[tuple[int, str | None], list[bytes]] = {}
        self._extras_are_due = True
        self._head_is_due = journal is not None and not journal.sent

    def resume(self) -> None:
        """Take up what another server has sent: the next events are those that follow."""
        if self._journal is None or not self._journal.sent:
            return
        self._extras_are_due = False
        head = self._journal.head
        self._generation.cached_tokens = head.cached_tokens if head else None
        try:
            for choice in self._generation.choices:
                sent = self._journal.sent.get(choice.index)
                if sent is not None:
                    self._pass_over(choice, choice.resume(sent))
        except BaseException:
            self._generation.close()
            raise

    def _pass_over(self, choice: Choice, deltas: list[TextDelta]) -> None:
        """All that an event leaves behind for those after it."""
        for delta in deltas:
            delta = self._reply.read(choice, delta)
            if delta.kind is None or not self._reply.differs_in_text_only:
                self._reply.chunk_choice(choice, delta, first=choice.index not in self._begun)
            self._begun.add(choice.index)
        self._begun.add(choice.index)  # perhaps without a token

    @property
    def usage_is_told(self) -> bool:
        journal = self._journal
        return journal is not None and len(self._generation.choices) in journal.sent

    def of(self, choice: Choice, deltas: list[TextDelta]) -> bytes:
        parts: list[bytes] = []
        journaled = self._journal is not None
        for delta in deltas:
            delta = self._reply.read(choice, delta)
            if delta.finish_reason is None:
                around = self._around_text.get((choice.index, delta.kind))
                if around is None:
                    around = self._around(choice, delta.kind)
                if around:
                    if journaled:
                        assert delta.token_id is not None, "only beginnings and ends have none"
                        parts.append(token_line(choice.index, delta.token_id))
                    parts.append(_encode(delta.text).join(around))
                    continue
            first = choice.index not in self._begun
            if first and self._reply.begins_in_order:
                parts += self._begin_before(choice.index)
            parts.append(self._event(choice, delta, first=first))
            self._begun.add(choice.index)
        return b"".join(parts)

    def _begin_before(self, index: int) -> Iterator[bytes]:
        """An event without text for each choice before this one that has none yet."""
        for choice in self._generation.choices[:index]:
            if choice.index not in self._begun:
                yield self._event(choice, TextDelta(None, "", None, None), first=True)
                self._begun.add(choice.index)

    def usage(self) -> bytes:
        chunk = self._reply.chunk([], self._generation)
        chunk["usage"] = usage_object(self._reply.usage(self._generation))
        if self._journal is None:
            return _event(chunk)
        return usage_line(len(self._generation.choices)) + _event(chunk)

    def _event(self, choice: Choice, delta: TextDelta, *, first: bool) -> bytes:
        event = self._plain_event(choice, delta, first=first)
        if self._journal is None:
            return event
        head = self._reply.head(self._generation) if self._head_is_due else None
        self._head_is_due = False
        ending = choice.ending if delta.finish_reason else None
        return line(choice.index, delta.token_id, ending, head) + event

    def _plain_event(self, choice: Choice, delta: TextDelta, *, first: bool) -> bytes:
        content = self._reply.chunk_choice(choice, delta, first=first)
        chunk = self._reply.chunk([content], self._generation)
        if self._extras_are_due:
            self._extras_are_due = False
            chunk.update(self._reply.extras(self._generation))
        return _event(chunk)

    def _around(self, choice: Choice, kind: Literal["content", "reasoning"] | None) -> list[bytes]:
        """The JSON of an event before, between and after its text; empty if it has more to it."""
        if kind is None or choice.index not in self._begun:
            return []
        around: list[bytes] = []
        if self._reply.differs_in_text_only:
            mark = TextDelta(0, _TEXT_GOES_HERE, None, None, kind)
            sample = self._plain_event(choice, mark, first=False)
            around = sample.split(_encode(_TEXT_GOES_HERE))
        self._around_text[choice.index, kind] = around
        return around


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`; what is not known is left out. At the end also where the time went, in
    milliseconds."""
    shaped: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        shaped["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        shaped["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    if (timing := usage.timing) is not None:
        shaped["headrace"] = {
            "queue_ms": _milliseconds(timing.queue),
            "prefill_ms": _milliseconds(timing.prefill),
            "decode_ms": _milliseconds(timing.decode),
            "preemptions": timing.preemptions,
        }
    return shaped


def prompt_header(usage: Usage) -> dict[str, str]:
    """What a front door learns from: the prompt's tokens, and how many of them were cached."""
    if usage.cached_tokens is None:
        return {}
    return {"headrace-prompt": f"tokens={usage.prompt_tokens};cached={usage.cached_tokens}"}


def server_timing(timing: Timing) -> str:
    """The Server-Timing header (https://www.w3.org/TR/server-timing): durations in ms."""
    stages = {"queue": timing.queue, "prefill": timing.prefill, "decode": timing.decode}
    return ", ".join(f"{name};dur={_milliseconds(value)}" for name, value in stages.items())


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
