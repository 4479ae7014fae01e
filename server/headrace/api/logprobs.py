"""Log-probabilities in the three shapes that clients know: OpenAI's chat, OpenAI's completions, and
vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.engine.client import TokenLogprobs
from headrace.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # what OpenAI sends for "impossible": JSON has no infinity


def chat_entry(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, top: int
) -> dict[str, Any]:
    """One element of a chat choice's `logprobs.content`."""
    pairs = zip(logprobs.top_token_ids[:top], logprobs.top_logprobs, strict=False)
    return {
        **_chat_token(tokenizer, token_id, logprobs.logprob),
        "top_logprobs": [_chat_token(tokenizer, other, logprob) for other, logprob in pairs],
    }


class CompletionLogprobs:
    """The four parallel lists of a completion's `logprobs`.

    `text_offset` counts characters from the beginning of the choice's text (the echoed prompt
    included).
    """

    def __init__(self, tokenizer: Tokenizer, top: int, *, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self.offset = offset
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, text: str, logprobs: TokenLogprobs | None) -> None:
        """`text` is what the token added. The first token of a prompt has no log-probability."""
        name = self._tokenizer.token_string(token_id)
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
            top.setdefault(self._tokenizer.token_string(other), _finite(value))
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


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode(errors="replace"),
        "logprob": _finite(logprob),
        "bytes": list(raw),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
