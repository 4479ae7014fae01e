"""Beam search: which sequences are followed, and when the best are known. Knows no engine.

Equals transformers' generate(num_beams=n, do_sample=False); the fields are vLLM's, and n is the
width.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from headrace.engine.client import TokenLogprobs
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.sampling_params import MAX_LOGPROBS, SamplingParams

# A score is that of the model's own distribution, and all sequences of a width live at once: what
# reshapes the one, or ends single sequences by their text, is left out.
_NOT_WITH_BEAMS = (
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "stop",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
)
_DEFAULTS = SamplingParams()


class BeamFields(BaseModel):
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


@dataclass(frozen=True, slots=True)
class BeamSettings:
    width: int
    length_penalty: float = 1.0
    """Scores are divided by length ** length_penalty: above 0 it favours long sequences."""
    early_stopping: bool | Literal["never"] = False
    """True: end as soon as `width` sequences have. False: end when it is unlikely that a better one
    comes. "never": end when none can come."""


def beam_settings(
    body: BeamFields, sampling: SamplingParams, *, stream: bool
) -> BeamSettings | None:
    """None where no beam search is asked for.

    Raises UnsupportedParameterError or InvalidRequestError for what cannot go with it, or without.
    """
    if not body.use_beam_search:
        for name, neutral in (("length_penalty", (None, 1.0)), ("early_stopping", (None, False))):
            if getattr(body, name) not in neutral:
                raise InvalidRequestError(f"{name} needs use_beam_search: true.", param=name)
        return None
    if stream:
        raise UnsupportedParameterError(
            "stream is not supported with use_beam_search: the best sequences are known at the "
            "end only. Leave it out.",
            param="stream",
        )
    if sampling.temperature not in (0.0, 1.0):
        raise UnsupportedParameterError(
            "use_beam_search does not sample: set temperature to 0 or leave it out.",
            param="temperature",
        )
    for name in _NOT_WITH_BEAMS:
        value = getattr(sampling, name)
        if value and value != getattr(_DEFAULTS, name) and (name, value) != ("top_k", -1):
            raise UnsupportedParameterError(
                f"{name} is not supported with use_beam_search; leave it out.", param=name
            )
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    if not -16 <= penalty <= 16:
        raise InvalidRequestError("length_penalty must be in [-16, 16].", param="length_penalty")
    return BeamSettings(sampling.n, penalty, body.early_stopping or False)


@dataclass(frozen=True, slots=True)
class Beam:
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Of all of them together."""
    entries: list[TokenLogprobs] = field(default_factory=list)
    """One for each token."""

    def extended(self, token_id: int, logprob: float, entry: TokenLogprobs) -> Beam:
        """With another token. `entry` tells of the distribution that it comes from."""
        own = TokenLogprobs(logprob, entry.top_token_ids, entry.top_logprobs)
        return Beam([*self.token_ids, token_id], self.logprob + logprob, [*self.entries, own])


class BeamSearch:
    """The state of one search. `num_top` is how many of the likeliest tokens `advance` needs.

    Raises InvalidRequestError when the engine does not tell of so many.
    """

    def __init__(
        self, settings: BeamSettings, end_token_ids: frozenset[int], max_tokens: int
    ) -> None:
        self._settings = settings
        self._ends = end_token_ids
        self._max_tokens = max_tokens
        self._length = 0
        self._finished: list[tuple[float, Beam]] = []
        self.running = [Beam()]
        """What to find the next tokens of; empty at the end."""
        # Of one beam's tokens at most all ends and `width` others can be of use.
        self.num_top = settings.width + len(end_token_ids)
        if self.num_top > MAX_LOGPROBS:
            raise InvalidRequestError(
                f"use_beam_search has at most {MAX_LOGPROBS - len(end_token_ids)} beams here; "
                f"n = {settings.width} asks for more.",
                param="n",
            )

    @property
    def best(self) -> list[Beam]:
        """The finished sequences, best first; `width` of them at the end."""
        return [beam for _, beam in self._finished]

    def advance(self, nexts: Sequence[TokenLogprobs]) -> None:
        """`nexts`: for each running beam the `num_top` likeliest next tokens. Of equal scores the
        one of the earlier beam, and of the smaller token, is the better one."""
        width = self._settings.width
        self._length += 1
        keep = width * max(2, 1 + len(self._ends))
        candidates = heapq.nsmallest(
            keep, self._candidates(nexts), key=lambda found: (-found[0], found[1], found[2])
        )
        running: list[Beam] = []
        for rank, (_, index, token_id, logprob) in enumerate(candidates):
            ends = token_id in self._ends or self._length == self._max_tokens
            # Those of lower rank are there to have `width` left that go on.
            if (ends and rank >= width) or (not ends and len(running) == width):
                continue
            beam = self.running[index].extended(token_id, logprob, nexts[index])
            if ends:
                self._finished.append((self._score(beam.logprob, self._length), beam))
            else:
                running.append(beam)
        self._finished.sort(key=lambda found: -found[0])  # stable: of equals the earlier one
        del self._finished[width:]
        self.running = [] if self._is_over(running) else running

    def _candidates(
        self, nexts: Sequence[TokenLogprobs]
    ) -> Iterator[tuple[float, int, int, float]]:
        """Score, beam, token and its own log-probability."""
        for index, (beam, entry) in enumerate(zip(self.running, nexts, strict=True)):
            for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
                yield beam.logprob + logprob, index, token_id, logprob

    def _score(self, logprob: float, length: int) -> float:
        return float(logprob / length**self._settings.length_penalty)

    def _is_over(self, running: list[Beam]) -> bool:
        if not running:
            return True
        if len(self._finished) < self._settings.width:
            return False
        if self._settings.early_stopping is True:
            return True
        never = self._settings.early_stopping == "never" and self._settings.length_penalty > 0
        length = self._max_tokens if never else self._length
        return self._score(running[0].logprob, length) <= self._finished[-1][0]
