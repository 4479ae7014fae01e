"""Log-probabilities in the three shapes that clients know: OpenAI's chat, OpenAI's completions, and
vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.engine.client import TokenLogprobs
from headrace.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # what OpenAI sends for "impossible": JSON has no infinity


def chat_entry(
    tokenizer: Tokenizer,
    token_id: int,
    logprobs: TokenLogprobs,
    top: int,
    *,
    as_ids: bool = False,
) -> dict[str, Any]:
    """One element of a chat choice's `logprobs.content`. `as_ids`: tokens are named by number."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {
            "token": _id_name(token_id) if as_ids else raw.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    pairs = zip(logprobs.top_token_ids[:top], logprobs.top_logprobs, strict=False)
    return {
        **token(token_id, logprobs.logprob),
        "top_logprobs": [token(other, logprob) for other, logprob in pairs],
    }


class CompletionLogprobs:
    """The four parallel lists of a completion's `logprobs`.

    `text_offset` counts characters from the beginning of the choice's text (the echoed prompt
    included). `as_ids`: tokens are named by number.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, *, as_ids: bool = False) -> None:
        self._name = _id_name if as_ids else tokenizer.token_string
        self._top = top
        self.offset = 0
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, text: str, logprobs: TokenLogprobs | None) -> None:
        """`text` is what the token added. The first token of a prompt has no log-probability."""
        name = self._name(token_id)
        self._tokens.append(name)
        self._offsets.append(self.offset)
        self.offset += len(text)
        if logprobs is None:
            self._token_logprobs.append(None)
            self._top_logprobs.append(None)
            return
        logprob = _finite(logprobs.logprob)
        top: dict[str, float] = {}
        pairs = zip(logprobs.top_token_ids[: self._top], logprobs.top_logprobs, strict=False)
        for other, value in pairs:
            # Best first: of two tokens with one name the likelier stays.
            top.setdefault(self._name(other), _finite(value))
        top.setdefault(name, logprob)
        self._token_logprobs.append(logprob)
        self._top_logprobs.append(top)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._offsets,
        }
        self._tokens, self._token_logprobs = [], []
        self._top_logprobs, self._offsets = [], []
        return taken


def prompt_entries(
    tokenizer: Tokenizer, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token, id -> log-probability, rank and text. The
    rank of a token that is not among the most likely is null."""
    shaped: list[dict[str, Any] | None] = []
    for token_id, entry in zip(prompt, entries, strict=True):
        if entry is None:
            shaped.append(None)
            continue
        candidates: dict[str, Any] = {
            str(other): _prompt_token(tokenizer, other, value, rank)
            for rank, (other, value) in enumerate(
                zip(entry.top_token_ids, entry.top_logprobs, strict=True), start=1
            )
        }
        candidates.setdefault(
            str(token_id), _prompt_token(tokenizer, token_id, entry.logprob, None)
        )
        shaped.append(candidates)
    return shaped


def _prompt_token(
    tokenizer: Tokenizer, token_id: int, logprob: float, rank: int | None
) -> dict[str, Any]:
    return {
        "logprob": _finite(logprob),
        "rank": rank,
        "decoded_token": tokenizer.token_string(token_id),
    }


def _id_name(token_id: int) -> str:
    """What vLLM calls a token when return_tokens_as_token_ids is set."""
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
