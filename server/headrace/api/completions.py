"""POST /v1/completions: text or token ids in, their continuation out.

https://platform.openai.com/docs/api-reference/completions; evaluation harnesses use it with echo
and logprobs to score texts.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from headrace.api import logprobs
from headrace.api.beam_generation import begin
from headrace.api.beam_search import beam_settings
from headrace.api.body import receive
from headrace.api.generation import (
    Choice,
    Generation,
    RequestContext,
    TextDelta,
    Usage,
    check_choices,
    new_id,
)
from headrace.api.logprobs import CompletionLogprobs
from headrace.api.prompts import Truncation, check_lengths, encode_prompt
from headrace.api.protocol import CompletionRequest
from headrace.api.reply import Reply
from headrace.api.services import services_of
from headrace.api.structured_output import make_output_grammar
from headrace.engine.client import Task
from headrace.text.detokenizer import Detokenizer


async def create_completion(request: Request) -> Response:
    """Text or token ids in, their continuation out."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, CompletionRequest)
        body.check_combinations()
        model = services.models.find(body.model)
        text, info = model.loaded_for(Task.GENERATE)
        sampling = body.sampling()
        beams = beam_settings(body, sampling, stream=bool(body.stream))
        check_choices(body.num_prompts, sampling.n)  # before they are tokenized
        prompts = await encode_prompt(
            text,
            body.prompt,
            info,
            add_special_tokens=body.add_special_tokens,
            truncation=Truncation.of(body, info),
        )
        check_lengths(prompts, sampling.max_tokens, info, param="prompt")
        context = RequestContext.of(request, body, new_id("cmpl"))
        grammar = await make_output_grammar(body, sampling)
        generation = begin(model, prompts, sampling, context, beams, grammar=grammar)
    reply = CompletionReply(
        body,
        response_id=context.response_id,
        model=model,
        tokenizer=text.tokenizer,
        ignored_fields=ignored,
        journal=context.journal,
    )
    return await reply.send(request, generation)


class CompletionReply(Reply):
    answer_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, **frame: Any) -> None:
        super().__init__(body, **frame)
        self._body = body
        self._tried = body.num_tried
        self._scores: dict[int, float] = {}
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def choice(self, choice: Choice, deltas: list[TextDelta]) -> dict[str, Any]:
        deltas = self._wanted(deltas)
        entries = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        self._scores[choice.index] = sum(entry.logprob for entry in entries)
        shaped: dict[str, Any] = {
            "index": choice.index,
            "text": self._echo(choice) + "".join(delta.text for delta in deltas),
            "logprobs": self._take_logprobs(choice, deltas, first=True),
            "finish_reason": choice.finish_reason,
        }
        return self._with_prompt(shaped, choice, deltas, first=True)

    async def answer(self, generation: Generation) -> dict[str, Any]:
        """Of `best_of` choices for each prompt the n of highest log-probability, best first."""
        answer = await super().answer(generation)
        n = self._body.n or 1
        if self._tried > n:
            choices = answer["choices"]
            best: list[dict[str, Any]] = []
            for first in range(0, len(choices), self._tried):
                ranked = sorted(
                    choices[first : first + self._tried],
                    key=lambda choice: -self._scores[choice["index"]],
                )
                best += ranked[:n]
            answer["choices"] = [{**choice, "index": i} for i, choice in enumerate(best)]
        return answer

    def chunk_choice(self, choice: Choice, delta: TextDelta, *, first: bool) -> dict[str, Any]:
        deltas = self._wanted([delta])
        text = "".join(delta.text for delta in deltas)
        shaped: dict[str, Any] = {
            "index": choice.index,
            "text": self._echo(choice) + text if first else text,
            "logprobs": self._take_logprobs(choice, deltas, first=first),
            "finish_reason": delta.finish_reason,
        }
        return self._with_prompt(shaped, choice, deltas, first=first)

    def usage(self, generation: Generation) -> Usage:
        usage = super().usage(generation)
        return usage._replace(completion_tokens=0) if self._body.echo_only else usage

    def _wanted(self, deltas: list[TextDelta]) -> list[TextDelta]:
        """Nothing, when only the prompt's log-probabilities are: the engine makes one token."""
        return [] if self._body.echo_only else deltas

    def _with_prompt(
        self, shaped: dict[str, Any], choice: Choice, deltas: list[TextDelta], *, first: bool
    ) -> dict[str, Any]:
        """With token ids and the prompt's log-probabilities, as asked for."""
        entries = choice.prompt_logprobs
        if first and entries is not None and self._body.prompt_logprobs is not None:
            shaped["prompt_logprobs"] = logprobs.prompt_entries(
                self._tokenizer, choice.prompt_token_ids, entries
            )
        if self._token_ids:
            shaped["token_ids"] = [delta.token_id for delta in deltas if delta.token_id is not None]
            if first:
                shaped["prompt_token_ids"] = choice.prompt_token_ids
        return shaped

    def _echo(self, choice: Choice) -> str:
        """The prompt as it was sent, or as its token ids read."""
        if not self._body.echo:
            return ""
        if self._body.truncate_prompt_tokens:
            return self._tokenizer.decode(choice.prompt_token_ids)
        prompt = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        sent = prompt[choice.index // self._tried]
        return sent if isinstance(sent, str) else self._tokenizer.decode(choice.prompt_token_ids)

    def _take_logprobs(
        self, choice: Choice, deltas: list[TextDelta], *, first: bool
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        collected = self._logprobs.get(choice.index)
        if collected is None:
            collected = CompletionLogprobs(
                self._tokenizer, self._body.logprobs, as_ids=self._tokens_as_ids
            )
            self._logprobs[choice.index] = collected
        if first and self._body.echo:
            self._add_prompt(collected, choice)
        for delta in deltas:
            if delta.token_id is not None:
                collected.add(delta.token_id, delta.text, delta.logprobs)
        return collected.take()

    def _add_prompt(self, collected: CompletionLogprobs, choice: Choice) -> None:
        pieces = Detokenizer(self._tokenizer)
        entries = choice.prompt_logprobs or [None] * len(choice.prompt_token_ids)
        for token_id, entry in zip(choice.prompt_token_ids, entries, strict=True):
            collected.add(token_id, pieces.push(token_id), entry)
        collected.offset = len(self._echo(choice))
