"""Token ids to text, one at a time: what is returned never ends in half a character.

The concatenation of everything returned is what decoding all the ids at once gives.
"""

from __future__ import annotations

import codecs

from headrace.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
_MAX_PENDING_TOKENS = 8  # a character is at most 4 bytes; whatever is longer is not a character


class Detokenizer:
    """Turns the ids of one sequence into text as they arrive.

    Where tokens are bytes (byte-level BPE, SentencePiece with byte fallback) a token costs one
    look-up and one step of a UTF-8 decoder. Invalid bytes become U+FFFD, one for each maximal
    invalid part (Unicode 16, section 3.9).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`shown`: ids of special tokens that are text all the same."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - shown if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._unfinished = False
        self._texts = tokenizer.whole_texts
        self._strip_space = tokenizer.strips_first_space
        self._window: list[int] = []
        self._window_text = ""
        self.push = self._push_bytes if tokenizer.bytes_are_exact else self._push_window

    def finish(self) -> str:
        """What is left when no token follows: an unfinished character as U+FFFD, or nothing."""
        if self._tokenizer.bytes_are_exact:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        rest, self._window_text = text[len(self._window_text) :], text
        return rest

    def _push_bytes(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if token_id in self._skip:
            return ""
        alone = not (self._unfinished or self._strip_space)
        if alone and (known := self._texts.get(token_id)) is not None:
            return known
        raw = self._tokenizer.token_bytes(token_id)
        if self._strip_space and raw:
            self._strip_space = False
            raw = raw.removeprefix(b" ")
        text = self._utf8.decode(raw)
        self._unfinished = bool(self._utf8.getstate()[0])
        if alone and not self._unfinished:
            self._texts[token_id] = text
        return text

    def _push_window(self, token_id: int) -> str:
        """For decoders that look at neighbours: decode a short window twice and return what is
        new. The window keeps the last token that is not skipped, so that the decoder sees what it
        follows."""
        if token_id in self._skip:
            return ""
        window = [*self._window, token_id]
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        if text.endswith(_UNFINISHED) and len(window) < _MAX_PENDING_TOKENS:
            self._window = window
            return ""
        rest = text[len(self._window_text) :]
        self._window = [token_id]
        self._window_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return rest
