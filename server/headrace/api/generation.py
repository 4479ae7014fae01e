"""From a prompt and sampling parameters to text: one Generation per HTTP request.

Owns the requests it submits: whatever happens to the HTTP side, they end with it. Knows no JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fastapi import Request

from headrace.api.ledger import RequestLedger
from headrace.api.model_table import ServedModel
from headrace.api.protocol import ChatCompletionRequest, CompletionRequest
from headrace.api.resume import STOP_TOKEN, Journal, Sent, no_journal
from headrace.api.services import services_of
from headrace.api.structured_output import OutputGrammar
from headrace.engine.client import (
    FinishReason,
    ModelInfo,
    RequestOutput,
    RequestRecord,
    RequestStream,
    TokenLogprobs,
)
from headrace.errors import (
    EngineError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from headrace.sampling_params import GenerateRequest, SamplingParams, ThinkingBudget
from headrace.text.message_text import MessagePiece
from headrace.text.output_text import OutputText
from headrace.text.tokenizer import Tokenizer

MAX_CHOICES = 256  # prompts x n in one HTTP request
IN_EFFECT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
)


class TextDelta(NamedTuple):
    """What one token adds to a choice.

    A reply may read more out of the text: then `pieces` is what it found, and `text` and `kind` say
    whether that is no more than a text of one kind.
    """

    token_id: int | None
    """None when the sequence ended between two tokens."""
    text: str
    """May be empty: half a character, a special token, or held back for a stop string."""
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    kind: Literal["content", "reasoning"] | None = "content"
    pieces: Sequence[MessagePiece] = ()


class Timing(NamedTuple):
    """Where the time of a request went, in seconds; of several choices, of the one that took
    longest."""

    queue: float
    """From arrival to the first step."""
    prefill: float
    """From there to the first token."""
    decode: float
    """From there to the last token."""
    preemptions: int | None
    """How often the choices gave up their memory; None when a stop string ended one of them, for
    the engine has not told yet."""


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    """None while unknown."""
    timing: Timing | None = None
    """None until the end."""
    reasoning_tokens: int | None = None
    """Of the completion's. None where reasoning is not told apart."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What comes with the HTTP request beside its body."""

    response_id: str
    ledger: RequestLedger
    priority: int = 0
    cache_salt: str = ""
    trace_context: str = ""
    journal: Journal | None = None
    """For a stream whose tokens a door keeps; None: none does."""

    @classmethod
    def of(
        cls,
        request: Request,
        body: ChatCompletionRequest | CompletionRequest,
        response_id: str,
    ) -> RequestContext:
        trace_context = request.headers.get("traceparent", "")
        return cls(
            response_id=response_id,
            ledger=services_of(request).ledger,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            trace_context=trace_context if len(trace_context) <= 128 else "",
            journal=Journal.of(request.headers, body.model_extra) if body.stream else None,
        )


class Choice:
    """One output sequence. `take` turns the engine's outputs into text."""

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        stream: RequestStream | None,
        tokenizer: Tokenizer,
        ledger: RequestLedger,
        shown: frozenset[int] = frozenset(),
        grammar_param: str | None = None,
    ) -> None:
        """`stream`: None where all of it was sent before."""
        self._grammar_param = grammar_param
        self.index = index
        self.prompt_token_ids = request.prompt_token_ids
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.ending: str | None = None
        """finish_reason for a journal: STOP_TOKEN tells that the last token has no text."""
        self.timing: Timing | None = None
        """Set with finish_reason."""
        self._arrival_time = request.arrival_time
        self._times = (0.0, 0.0)  # of the first step, and of the first token
        self._request_id = request.request_id
        self._stream = stream
        self._ledger = ledger
        if stream is not None:
            self._meter = ledger.open(
                request.request_id,
                request.arrival_time,
                resumed_tokens=len(request.resume_token_ids),
            )
        sampling = request.sampling
        self._text = OutputText(
            tokenizer,
            stop=sampling.stop,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            shown=shown,
            min_tokens=sampling.min_tokens,
        )

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return self._text.stopped

    async def run(self, emit: Callable[[Choice, list[TextDelta]], None]) -> None:
        """Read to the end, handing over the deltas of each output. Raises EngineError and its
        siblings if there is no regular end."""
        if self._stream is None:
            return

        def on_output(output: RequestOutput) -> None:
            emit(self, self.take(output))
            if self.finish_reason is not None:
                self.close()

        try:
            await self._stream.read(on_output)
            if self.finish_reason is None:
                raise UnavailableError("The request was aborted by the server; try again.")
        finally:
            self.close()

    def take(self, output: RequestOutput) -> list[TextDelta]:
        """The deltas of one output, one per token; sets finish_reason with the last one."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
            # After a restart of the engine there is another first output.
            if not self._times[1]:
                self._times = (output.scheduled_time, output.first_token_time)
        self._meter.tokens(len(output.token_ids))
        ending = output.finish_reason
        if ending is not None and ending not in (FinishReason.STOP, FinishReason.LENGTH):
            raise _failure(ending, output.error, self._grammar_param)
        texts = self._text.push_output(
            output.token_ids,
            ends=ending is not None,
            ends_with_stop_token=output.stop_token_id is not None,
        )
        self.completion_tokens += len(texts)
        logprobs = output.logprobs or itertools.repeat(None)
        deltas = [
            TextDelta(token_id, text, entry, None)
            for token_id, text, entry in zip(output.token_ids, texts, logprobs, strict=False)
        ]
        if self._text.stopped is not None:
            self.finish_reason = "stop"
        elif ending is not None:
            self.finish_reason = str(ending)
        if self.finish_reason is not None:
            at_token = self._text.stopped is None and output.stop_token_id is not None
            self.ending = STOP_TOKEN if at_token else self.finish_reason
            self.timing = self._timing(output.record)
            if not deltas:  # it ended between tokens
                deltas.append(TextDelta(None, self._text.finish(), None, None))
            deltas[-1] = deltas[-1]._replace(finish_reason=self.finish_reason)
        return deltas

    def resume(self, sent: Sent) -> list[TextDelta]:
        """The deltas of what was sent before, by another server. Raises InvalidRequestError for
        tokens behind the end."""
        ending = sent.finish_reason
        texts = self._text.push_output(
            sent.token_ids,
            ends=ending is not None,
            ends_with_stop_token=ending == STOP_TOKEN,
        )
        if ending is None and self._text.stopped is not None:
            self.close()
            raise no_journal(f"choice {self.index} has ended")
        self.completion_tokens = len(texts)
        pairs = zip(sent.token_ids, texts, strict=False)
        deltas = [TextDelta(token_id, text, None, None) for token_id, text in pairs]
        if ending is not None:
            self.finish_reason = str(FinishReason.STOP) if ending == STOP_TOKEN else ending
            if not deltas:
                deltas.append(TextDelta(None, self._text.finish(), None, None))
            deltas[-1] = deltas[-1]._replace(finish_reason=self.finish_reason)
        return deltas

    def _timing(self, record: RequestRecord | None) -> Timing:
        scheduled, first = self._times
        end = time.monotonic() if record is None else record.finished_time
        return Timing(
            max(scheduled - self._arrival_time, 0.0),
            max(first - scheduled, 0.0),
            max(end - first, 0.0),
            None if record is None else record.preemptions,
        )

    def close(self) -> None:
        """End the request, if it still runs. Idempotent."""
        if self._stream is None:
            return
        self._stream.abort()
        self._ledger.leave(self._request_id, stopped_by_text=self._text.stopped is not None)


class Generation:
    """All choices of one HTTP request: for each prompt, n of them in a row."""

    def __init__(
        self, prompts: Sequence[list[int]], sampling: SamplingParams, info: ModelInfo
    ) -> None:
        self.choices: list[Choice] = []
        self._sampling = sampling
        self._room = info.max_model_len - max(map(len, prompts))
        self._prompt_tokens = sum(map(len, prompts))
        self._n = sampling.n
        self.cached_tokens: int | None = None
        """Those that were told before, by another server."""

    @property
    def max_tokens(self) -> int:
        return min(self._sampling.max_tokens or self._room, self._room)

    @property
    def seed(self) -> int:
        assert self._sampling.seed is not None, "start() has drawn one"
        return self._sampling.seed

    def sampling_in_effect(self) -> dict[str, Any]:
        """The parameters that choose tokens, with what the request left open: sent again, they
        give the same output. Of several prompts the longest one limits max_tokens."""
        values = {name: getattr(self._sampling, name) for name in IN_EFFECT}
        values["max_tokens"] = self.max_tokens
        return values

    @property
    def usage(self) -> Usage:
        """A prompt counts once for its n choices, and so does what was cached of it."""
        cached = [choice.cached_tokens for choice in self.choices[:: self._n]]
        known = [tokens for tokens in cached if tokens is not None]
        cached_tokens = self.cached_tokens
        if cached_tokens is None and len(known) == len(cached):
            cached_tokens = sum(known)
        return Usage(
            self._prompt_tokens,
            sum(choice.completion_tokens for choice in self.choices),
            cached_tokens,
            timing=self._timing(),
        )

    def _timing(self) -> Timing | None:
        timings = [choice.timing for choice in self.choices]
        ended = [timing for timing in timings if timing is not None]
        if len(ended) < len(timings) or not ended:
            return None
        longest = max(ended, key=lambda timing: timing.queue + timing.prefill + timing.decode)
        counts = [timing.preemptions for timing in ended if timing.preemptions is not None]
        known = len(counts) == len(ended)
        return longest._replace(preemptions=sum(counts) if known else None)

    async def run(self, emit: Callable[[Choice, list[TextDelta]], None]) -> None:
        """Run all choices to their end. The first failure ends the others and is raised."""
        if len(self.choices) == 1:
            await self.choices[0].run(emit)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for choice in self.choices:
                    tasks.create_task(choice.run(emit))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            self.close()

    def close(self) -> None:
        for choice in self.choices:
            choice.close()


def start(
    model: ServedModel,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    context: RequestContext,
    *,
    shown: frozenset[int] = frozenset(),
    grammar: OutputGrammar | None = None,
    thinking: ThinkingBudget | None = None,
) -> Generation:
    """Submit every prompt n times. `shown`: special tokens that are part of the text. `grammar`:
    what each output must be. `thinking`: how long it may be thought before.

    Raises what EngineClient.submit raises; then nothing is left submitted.
    """
    text, info = model.loaded()
    check_choices(len(prompts), sampling.n)
    journal = context.journal or Journal()
    sampling = journal.seeded(sampling)
    generation = Generation(prompts, sampling, info)
    journal.check(
        num_choices=len(prompts) * sampling.n,
        vocab_size=info.vocab_size,
        max_tokens=generation.max_tokens,
        fingerprint=model.fingerprint,
    )
    banned = text.tokenizer.spellings(sampling.bad_words)
    arrival = time.monotonic()
    several = len(prompts) * sampling.n > 1
    try:
        for prompt in prompts:
            for repeat in range(sampling.n):
                index = len(generation.choices)
                request = GenerateRequest(
                    request_id=f"{context.response_id}-{index}" if several else context.response_id,
                    prompt_token_ids=prompt,
                    sampling=journal.of_choice(sampling.choice(repeat), index),
                    arrival_time=arrival,
                    priority=context.priority,
                    cache_salt=context.cache_salt,
                    model_revision=model.revision,
                    banned_sequences=banned,
                    trace_context=context.trace_context,
                    grammar="" if grammar is None else grammar.text,
                    thinking=thinking,
                    resume_token_ids=journal.token_ids(index),
                )
                stream = None if journal.has_ended(index) else model.client.submit(request)
                choice = Choice(
                    index,
                    request,
                    stream,
                    text.tokenizer,
                    context.ledger,
                    shown,
                    grammar_param=grammar.param if grammar else None,
                )
                generation.choices.append(choice)
    except BaseException:
        generation.close()
        raise
    return generation


def check_choices(num_prompts: int, n: int) -> None:
    """Raises InvalidRequestError for more choices than one HTTP request may have."""
    if num_prompts * n > MAX_CHOICES:
        raise InvalidRequestError(
            f"{num_prompts} prompts with n = {n} make more than {MAX_CHOICES} choices; split them "
            "over several requests.",
            param="n" if n > 1 else "prompt",
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _failure(reason: FinishReason, message: str | None, grammar_param: str | None) -> HeadraceError:
    if reason is FinishReason.REFUSED:
        return InvalidRequestError(
            f"{grammar_param} cannot be honoured: {message}", param=grammar_param
        )
    if reason is FinishReason.DEADLINE:
        return OverloadedError(message or "The request waited past its deadline; try again later.")
    if reason is FinishReason.ABORT:
        return UnavailableError(message or "The request was aborted by the server; try again.")
    return EngineError(message or "The engine failed while it worked on this request.")
