"""The text of one output sequence: detokenizer, then stop strings, as one chain.

Online and offline use share it; it knows neither requests nor the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.text.detokenizer import Detokenizer
from headrace.text.stop import StopMatcher
from headrace.text.tokenizer import Tokenizer


class OutputText:
    """Feed it tokens, get the text that may be shown. Once `stopped` is set, generation is over."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """`shown`: ids of special tokens that are not skipped. `min_tokens`: stop strings are
        looked for only after that many tokens."""
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, shown=shown
        )
        self._stop = StopMatcher(stop, include=include_stop_str_in_output) if stop else None
        self._include_stop = include_stop_str_in_output
        self._unwatched = min_tokens

    @property
    def stopped(self) -> str | None:
        """The stop string that was found."""
        return None if self._stop is None else self._stop.found

    def push_output(
        self, token_ids: Sequence[int], *, ends: bool, ends_with_stop_token: bool = False
    ) -> list[str]:
        """The text of each token of an output, up to the one that completes a stop string.

        `ends`: no token follows these, so that what was held back belongs to the last one.
        """
        if self._stop is None and not ends:  # nearly always, for every token
            return list(map(self._detokenizer.push, token_ids))
        texts: list[str] = []
        for position, token_id in enumerate(token_ids, start=1):
            last = ends and position == len(token_ids)
            if last and ends_with_stop_token:
                text = self.push_stop_token(token_id)
            else:
                text = self.push(token_id)
            texts.append(text + self.finish() if last else text)
            if self.stopped is not None:
                break
        return texts

    def push(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        if self._stop is None:
            return text
        if self._unwatched > 0:
            self._unwatched -= 1
            return text
        return self._stop.push(text)

    def push_stop_token(self, token_id: int) -> str:
        """A token that ended the sequence is part of the text only when stop strings are."""
        return self.push(token_id) if self._include_stop else ""

    def finish(self) -> str:
        """What was held back, when no token follows."""
        text = self._detokenizer.finish()
        if self._stop is None:
            return text
        return self._stop.push(text) + self._stop.finish()
