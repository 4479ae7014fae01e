"""Streams that can go on elsewhere: what a replica tells a door, and takes up from another replica.

A door sends the header `headrace-journal: 1`. A stream is then told with its tokens: the first line
of an event is a comment, `: headrace {"c":[[choice, [token ids], finish_reason], ...]}`, which the
door strips, and keeps once it has forwarded the event. When the replica dies it sends the request
to another one with the member `headrace_resume`: what it has kept. The tokens are taken up without
a word, and the stream goes on behind them.

Clients may do the same: nothing is trusted, and it gives them no more than sending the tokens does.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from headrace.errors import InvalidRequestError, UnavailableError
from headrace.sampling_params import SamplingParams

HEADER = "headrace-journal"
FIELD = "headrace_resume"
VERSION = "1"
STOP_TOKEN = "stop_token"
"""The finish_reason in a journal where a stop token is the last one."""

SEED_BITS = 53  # a drawn seed survives JSON in every language

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class Head(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the first event of a stream fixes for the rest of it. Opaque to the door."""

    id: Annotated[str, Meta(max_length=64)]
    created: int
    seed: int
    fingerprint: str | None = None
    """Of the model's weights, tokenizer and template."""
    cached_tokens: int | None = None
    """Of the prompt, when it was computed first; None where that was not known yet."""


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """What a client has of one choice."""

    index: Annotated[int, Meta(ge=0, le=256)]
    token_ids: list[TokenId]
    finish_reason: Annotated[str, Meta(max_length=32)] | None


class _Resume(msgspec.Struct, frozen=True):
    head: Head | None = None
    c: list[Sent] = []
    events: Annotated[int, Meta(ge=0)] = 0
    """Forwarded; comments are none."""


class Journal:
    """A stream of which the door keeps the tokens. `head`, `sent`, `events`: what it has kept."""

    def __init__(
        self,
        head: Head | None = None,
        sent: Mapping[int, Sent] | None = None,
        events: int = 0,
    ) -> None:
        self.head = head
        self.sent: Mapping[int, Sent] = sent or {}
        """What a choice has said is in it from its first event on, with tokens or without."""
        self.events = events
        """For APIs where a token may have no event, or several: it is kept with its first one."""

    @classmethod
    def of(cls, headers: Mapping[str, str], fields: Mapping[str, Any] | None) -> Journal | None:
        """None where no door asks for it. `fields`: the body's, beside those of its model.

        Raises InvalidRequestError for a member that no journal makes.
        """
        if not is_journaled(headers):
            return None
        value = (fields or {}).get(FIELD)
        if value is None:
            return cls()
        try:
            resume = msgspec.convert(value, _Resume)
        except msgspec.ValidationError as error:
            raise no_journal(str(error)) from None
        sent = {entry.index: entry for entry in resume.c}
        if len(sent) < len(resume.c):
            raise no_journal("a choice is there twice")
        if sent and resume.head is None:
            raise no_journal("there are tokens and no head")
        return cls(resume.head, sent, resume.events)

    def check(
        self, *, num_choices: int, vocab_size: int, max_tokens: int, fingerprint: str | None
    ) -> None:
        """Whether what was sent can be taken up here. `max_tokens`: of one choice.

        Raises InvalidRequestError for what no stream of this request can have sent, and
        UnavailableError where another model has begun it.
        """
        if self.head is not None and self.head.fingerprint != fingerprint:
            raise UnavailableError(
                "This stream was begun with other weights, another tokenizer or template; here it "
                "cannot go on as it would have."
            )
        for index, sent in self.sent.items():
            if index > num_choices:
                raise no_journal(f"there is no choice {index}")
            if index == num_choices:
                continue  # usage_line's, or first_line's
            if sent.token_ids and max(sent.token_ids) >= vocab_size:
                raise no_journal(f"choice {index} has token ids outside [0, {vocab_size - 1}]")
            if len(sent.token_ids) > max_tokens - (sent.finish_reason is None):
                raise no_journal(f"choice {index} has more tokens than the request allows")

    def seeded(self, sampling: SamplingParams) -> SamplingParams:
        """With the seed that the stream began with; else one is drawn, so that it can be told."""
        if sampling.seed is not None:
            return sampling
        seed = self.head.seed if self.head else secrets.randbits(SEED_BITS)
        return dataclasses.replace(sampling, seed=seed)

    def of_choice(self, sampling: SamplingParams, index: int) -> SamplingParams:
        """What is left to ask for: nothing of the prompt, once a choice has begun."""
        if index in self.sent and sampling.prompt_logprobs is not None:
            return dataclasses.replace(sampling, prompt_logprobs=None)
        return sampling

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompt of a stream of one choice, when it was computed first."""
        told = self.head.cached_tokens if self.head else None
        return self.sent[1].token_ids[0] if told is None and self.token_ids(1) else told

    def token_ids(self, index: int) -> list[int]:
        """Those of a choice that the client has."""
        sent = self.sent.get(index)
        return [] if sent is None else sent.token_ids

    def has_ended(self, index: int) -> bool:
        sent = self.sent.get(index)
        return sent is not None and sent.finish_reason is not None


def is_journaled(headers: Mapping[str, str]) -> bool:
    return headers.get(HEADER) == VERSION


def token_line(index: int, token_id: int) -> bytes:
    """Of an event of one token in the middle of a choice."""
    return b': headrace {"c":[[%d,[%d],null]]}\n' % (index, token_id)


def line(
    index: int, token_id: int | None, finish_reason: str | None, head: Head | None = None
) -> bytes:
    """Of any event. No token: it begins or ends the choice without one."""
    entry = Sent(index, [] if token_id is None else [token_id], finish_reason)
    told: dict[str, Any] = {"c": [entry]}
    if head is not None:
        told["head"] = head
    return b": headrace " + msgspec.json.encode(told) + b"\n"


def first_line(token_id: int | None, ending: str | None, cached_tokens: int | None) -> bytes:
    """Of the first token of the only choice, where the head came before it: with cached_tokens,
    kept as if it were a token of one more choice."""
    entries = [Sent(0, [] if token_id is None else [token_id], ending)]
    if cached_tokens is not None:
        entries.append(Sent(1, [cached_tokens], None))
    return b": headrace " + msgspec.json.encode({"c": entries}) + b"\n"


def head_line(head: Head) -> bytes:
    """Of a first event that comes before any token."""
    return b": headrace " + msgspec.json.encode({"c": [], "head": head}) + b"\n"


def usage_line(num_choices: int) -> bytes:
    """Of the event after the last token, kept as if it were the end of one more choice."""
    return line(num_choices, None, "usage")


def no_journal(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{FIELD} is no journal of this request: {problem}. Send it without, to begin anew.",
        param=FIELD,
    )
