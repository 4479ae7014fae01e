"""The value types that api, text and engine share: what to sample, and one request in token ids."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from headrace.errors import InvalidRequestError

MAX_LOGPROBS = 20  # OpenAI's limit on top_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    Filters apply in the order penalties and logit_bias, temperature, top_k, top_p, min_p. Every
    field's default leaves the model's distribution as it is.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 (or -1, as other servers write it) means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL,
    arXiv 1909.05858). The two OpenAI penalties count output tokens only."""
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    """A seeded request repeats its output exactly; without one a random seed is drawn."""
    n: int = 1
    max_tokens: int | None = None
    """None: as many as the context holds."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be sampled before this many output tokens."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    """Strings that are not generated, in the tokens that spell them alone and after a space; other
    spellings of theirs are not found."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that can be sampled; None: all."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: none. 0: of the sampled token. k: also of the k most likely tokens. Log-probabilities
    are those of the model's own distribution, before penalties, bias, temperature and filters."""
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _in_range("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("n", self.n, 1, 128)
        _in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _in_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens ({self.min_tokens}) is larger than max_tokens "
                    f"({self.max_tokens}); lower it or raise max_tokens.",
                    param="min_tokens",
                )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _in_range(name, count, 0, MAX_LOGPROBS)
        if any(not text for text in self.stop):
            raise InvalidRequestError("stop must not contain an empty string.", param="stop")
        if any(not word.strip() for word in self.bad_words):
            raise InvalidRequestError(
                "bad_words must not contain an empty or blank string.", param="bad_words"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids must name a token; leave it out to allow all.",
                param="allowed_token_ids",
            )
        for token_id, bias in (self.logit_bias or {}).items():
            _in_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, param="logit_bias")

    def choice(self, index: int) -> SamplingParams:
        """Parameters of choice `index` of n: one sequence, with the seed seed + index."""
        seed = self.seed
        if seed is not None:
            seed = (seed + index + 2**63) % 2**64 - 2**63
        return dataclasses.replace(self, n=1, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a request wants instead of tokens: one vector of its prompt."""

    task: Literal["embed", "classify"] = "embed"
    """embed: hidden states pooled; classify: the logits of a classifier's labels."""
    pooling: Literal["mean", "cls", "last"] = "last"
    """The mean over all tokens, the first one, or the last one."""
    normalize: bool = True
    """The vector is made one long."""
    dimensions: int | None = None
    """Only the first values are kept, before that."""
    second_text: int | None = None
    """Where the second text of a pair begins in the prompt, for models that tell them apart."""

    @property
    def needs_all_tokens(self) -> bool:
        """Whether hidden states of a cached prefix would be missed."""
        return self.pooling != "last"


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """How long a model may think before its end of thinking is forced."""

    max_tokens: int
    """Tokens between the two markers."""
    begin_id: int | None
    """The marker that the output has to begin with for the rest to be thought; None: the prompt has
    it already."""
    end_id: int


BACKGROUND_PRIORITY = 2**31 - 1
"""Requests of this priority are computed only in steps in which no other runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate, or to pool, in token ids. The engine knows no text.

    `sampling.n` is 1 here: a request for n choices is n of these, sharing their prompt's blocks.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time: float = 0.0
    """time.monotonic() seconds; processes of one host share that clock."""
    priority: int = 0
    """Lower is served first; BACKGROUND_PRIORITY is the highest there is."""
    deadline: float | None = None
    """time.monotonic() seconds after which a request still waiting is dropped."""
    tenant: str = ""
    cache_salt: str = ""
    """Requests share cached blocks only with those of the same salt."""
    adapter: str = ""
    model_revision: str = ""
    trace_context: str = ""
    """W3C traceparent."""
    banned_sequences: list[list[int]] = field(default_factory=list)
    """`sampling.bad_words` in token ids: sequences that may not be completed."""
    grammar: str = ""
    """What the output must be, in llguidance's Lark (its docs/syntax.md), where a JSON schema is
    `%json {...}` and a special token `<name>` or `<[id]>`. Empty: anything."""
    pooling: PoolingParams | None = None
    """Nothing is generated: the request ends with a vector."""
    thinking: ThinkingBudget | None = None
    resume_token_ids: list[int] = field(default_factory=list)
    """Output tokens already delivered: by an engine that died, or by another server."""


def _in_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    param: str | None = None,
) -> None:
    if math.isfinite(value) and (low < value if low_open else low <= value) and value <= high:
        return
    bracket = "(" if low_open else "["
    raise InvalidRequestError(
        f"{name} must be in {bracket}{low}, {high}], got {value}.", param=param or name
    )
