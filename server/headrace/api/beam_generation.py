"""Runs beam searches on an engine: a Generation whose choices are the best sequences.

Each step asks the engine for one token after each of the beams, with the likeliest ones. So the
engine knows nothing of beams: the prefix cache holds what they share, and a step computes what is
not in whole blocks, at most a block for each beam. What it costs is that, and that the tokens of a
beam travel to the engine again in each step: with four beams of 48 tokens (SmolLM2-135M, two cores)
three to seven times the time of four greedy sequences.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from headrace.api.beam_search import Beam, BeamSearch, BeamSettings
from headrace.api.generation import Choice, Generation, RequestContext, check_choices, start
from headrace.api.ledger import RequestLedger
from headrace.api.model_table import ServedModel
from headrace.api.structured_output import OutputGrammar
from headrace.engine.client import (
    FinishReason,
    RequestOutput,
    RequestRecord,
    RequestStream,
    TokenLogprobs,
)
from headrace.errors import (
    EngineError,
    OverloadedError,
    UnavailableError,
    UnsupportedParameterError,
)
from headrace.sampling_params import GenerateRequest, SamplingParams, ThinkingBudget

_RETRY_SECONDS = 0.05


def begin(
    model: ServedModel,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    context: RequestContext,
    beams: BeamSettings | None,
    *,
    shown: frozenset[int] = frozenset(),
    grammar: OutputGrammar | None = None,
    thinking: ThinkingBudget | None = None,
) -> Generation:
    """What a request asks for: a beam search, or else as `generation.start`, and it raises that."""
    if beams is None:
        return start(
            model, prompts, sampling, context, shown=shown, grammar=grammar, thinking=thinking
        )
    param = grammar.param if grammar else "thinking_token_budget" if thinking else None
    if param is not None:
        raise UnsupportedParameterError(
            f"{param} is not supported with use_beam_search; leave one of them out.", param=param
        )
    return start_beam_search(model, prompts, sampling, beams, context, shown)


def start_beam_search(
    model: ServedModel,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    settings: BeamSettings,
    context: RequestContext,
    shown: frozenset[int],
) -> Generation:
    """Begin a search for each prompt; the choices are `width` sequences each, best first.

    Raises what EngineClient.submit raises; then nothing is left submitted. InvalidRequestError for
    a width that the engine has not enough log-probabilities for.
    """
    text, info = model.loaded()
    check_choices(len(prompts), settings.width)
    sampling = dataclasses.replace(sampling, temperature=0.0, seed=sampling.seed or 0)
    generation = Generation(prompts, sampling, info)
    ends = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        ends |= frozenset(info.eos_token_ids)
    searches: list[_Search] = []
    try:
        for prompt in prompts:
            room = info.max_model_len - len(prompt)
            state = BeamSearch(settings, ends, min(sampling.max_tokens or room, room))
            request = GenerateRequest(
                request_id=f"{context.response_id}-search{len(searches)}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    temperature=0.0,
                    seed=0,
                    max_tokens=1,
                    ignore_eos=True,
                    logprobs=max(state.num_top, sampling.logprobs or 0),
                ),
                arrival_time=time.monotonic(),
                priority=context.priority,
                cache_salt=context.cache_salt,
                model_revision=model.revision,
                trace_context=context.trace_context,
            )
            searches.append(_Search(model, state, request, ends))
        for search in searches:
            for rank in range(settings.width):
                index = len(generation.choices)
                request = dataclasses.replace(
                    search.request,
                    request_id=f"{context.response_id}-{index}",
                    sampling=dataclasses.replace(sampling, n=1),
                )
                stream = _Hypothesis(search, rank, request, context.ledger)
                choice = Choice(index, request, stream, text.tokenizer, context.ledger, shown)
                generation.choices.append(choice)
    except BaseException:
        generation.close()
        for search in searches:
            search.close()
        raise
    return generation


class _Search:
    """One search and its requests. The first step is submitted at once."""

    def __init__(
        self,
        model: ServedModel,
        search: BeamSearch,
        request: GenerateRequest,
        end_token_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.ends = end_token_ids
        self.first = RequestOutput(request_id=request.request_id)
        """Of the prompt."""
        self._client = model.client
        self._search = search
        self._steps = 0
        self._streams = [self._submit(Beam(), 0)]
        self._task: asyncio.Task[list[Beam]] | None = None

    async def best(self) -> list[Beam]:
        """The same for everyone who asks. Cancelling one does not end it: `close` does."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
        for stream in self._streams:
            stream.abort()

    async def _run(self) -> list[Beam]:
        try:
            while self._search.running:
                if self._steps:
                    await self._submit_all()
                self._search.advance([await self._entry(stream) for stream in self._streams])
                self._steps += 1
            return self._search.best
        finally:
            for stream in self._streams:
                stream.abort()

    async def _submit_all(self) -> None:
        """What was begun goes on when the queue is full, as requests do that have begun."""
        self._streams = []
        for index, beam in enumerate(self._search.running):
            while True:
                try:
                    self._streams.append(self._submit(beam, index))
                    break
                except OverloadedError:
                    await asyncio.sleep(_RETRY_SECONDS)

    def _submit(self, beam: Beam, index: int) -> RequestStream:
        request = dataclasses.replace(
            self.request,
            request_id=f"{self.request.request_id}-{self._steps}-{index}",
            prompt_token_ids=[*self.request.prompt_token_ids, *beam.token_ids],
            arrival_time=time.monotonic(),
        )
        return self._client.submit(request)

    async def _entry(self, stream: RequestStream) -> TokenLogprobs:
        async for output in stream:
            if output.finish_reason is FinishReason.LENGTH and output.logprobs:
                if not self._steps:
                    self.first = output
                return output.logprobs[0]
            if output.finish_reason is not None:
                raise EngineError(output.error or "The engine failed in the middle of a search.")
        raise UnavailableError("The request was aborted by the server; try again.")


class _Hypothesis:
    """One of the sequences as if the engine had made it: a RequestStream of one output."""

    def __init__(
        self, search: _Search, rank: int, request: GenerateRequest, ledger: RequestLedger
    ) -> None:
        self.request_id = request.request_id
        self._request = request
        self._search = search
        self._rank = rank
        self._ledger = ledger
        self._told = False

    def __aiter__(self) -> _Hypothesis:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._told:
            raise StopAsyncIteration
        beams = await self._search.best()
        if self._rank >= len(beams):
            raise EngineError("The search found too few sequences; ask for fewer with n.")
        beam = beams[self._rank]
        ended = beam.token_ids[-1] in self._search.ends
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        record = self._tell(reason, len(beam.token_ids))
        first = self._search.first
        return RequestOutput(
            request_id=self.request_id,
            token_ids=beam.token_ids,
            logprobs=beam.entries if self._request.sampling.logprobs is not None else None,
            cached_tokens=record.cached_tokens,
            scheduled_time=first.scheduled_time,
            first_token_time=first.first_token_time,
            finish_reason=reason,
            stop_token_id=beam.token_ids[-1] if ended else None,
            record=record,
        )

    async def read(self, on_output: Callable[[RequestOutput], None]) -> None:
        async for output in self:
            on_output(output)

    def abort(self) -> None:
        """Ends the whole search: its choices are wanted together."""
        if not self._told:
            self._search.close()
            self._tell(FinishReason.ABORT, 0)

    def _tell(self, reason: FinishReason, output_tokens: int) -> RequestRecord:
        """The engine knows only of steps, so the account of the whole is closed here."""
        self._told = True
        first = self._search.first
        record = RequestRecord(
            request_id=self.request_id,
            finish_reason=reason,
            prompt_tokens=len(self._request.prompt_token_ids),
            output_tokens=output_tokens,
            cached_tokens=first.cached_tokens or 0,
            preemptions=0,
            arrival_time=self._request.arrival_time,
            scheduled_time=first.scheduled_time,
            first_token_time=first.first_token_time,
            finished_time=time.monotonic(),
            max_tokens=self._request.sampling.max_tokens,
        )
        self._ledger.close(record)
        return record
