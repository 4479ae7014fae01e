"""Splits what a model thinks from what it answers.

Models that think write it first, between two markers, of which the first one may be the end of the
prompt: templates open it themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from headrace.errors import ConfigError
from headrace.text.incoming import IncomingText, Reading

_MAX_HELD_SPACE = 64
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class ReasoningFormat:
    name: str
    open: str
    close: str

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and have to be in the text all the same."""
        return (self.open, self.close)

    def is_open_at_end(self, prompt: str) -> bool:
        """Whether the output goes on thinking. `prompt`: its end, as text."""
        return prompt.rstrip().endswith(self.open)

    def is_open_in(self, message: str) -> bool:
        """The same where the output continues the assistant's own `message`."""
        return self.open in message and self.close not in message.rpartition(self.open)[2]


FORMATS = {
    form.name: form
    for form in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    )
}


def reasoning_format(name: str, template: str) -> ReasoningFormat | None:
    """The format of --reasoning-parser `name`; for "auto" the one whose closing marker the chat
    template has. "none": None. Raises ConfigError for an unknown name."""
    if name == "none":
        return None
    if name == "auto":
        return next((form for form in FORMATS.values() if form.close in template), None)
    if name not in FORMATS:
        known = ", ".join(("auto", "none", *FORMATS))
        raise ConfigError(f"--reasoning-parser {name!r} is not one of {known}.")
    return FORMATS[name]


class Thought(NamedTuple):
    """What a piece of output adds."""

    reasoning: str
    content: str


class ReasoningReader:
    """Feed it the text of one answer. `begun`: the prompt has the opening marker.

    An opening marker counts at the beginning of the answer only. White space beside the markers is
    dropped; it and markers that are not complete are all that is held back.
    """

    def __init__(self, form: ReasoningFormat, *, begun: bool = False) -> None:
        self._form = form
        self._begun = begun
        self._in = IncomingText()
        self._plain = re.compile(f"[^{re.escape(form.close[0])}]*")
        self._reasoning = ""
        self._content = ""
        self._space = ""
        self.thinking = begun
        """Whether what comes is reasoning, as far as it is known."""
        self._finished = False
        self._steps = self._answer()

    def push(self, text: str) -> Thought:
        if self._finished:
            return Thought("", text)
        self._in.push(text)
        return self._advance()

    def finish(self) -> Thought:
        """What was held back, when no text follows."""
        self._in.ended = True
        return self._advance()

    def _advance(self) -> Thought:
        next(self._steps, None)
        thought = Thought(self._reasoning, self._content)
        self._reasoning = self._content = ""
        return thought

    def _answer(self) -> Reading[None]:
        self._in.start_record()
        space = yield from self._in.word(_BLANK, _MAX_HELD_SPACE)
        self._in.take(len(space))
        self.thinking = bool((yield from self._in.take_literal((self._form.open,)))) or self._begun
        if self.thinking:
            self._in.recorded()
            yield from self._thoughts()
            self.thinking = False
            while (yield from self._in.ahead(1)).isspace():
                self._in.take()
            self._content = self._in.take_rest()
        else:
            self._in.take_rest()
            self._content = self._in.recorded()
        self._finished = True

    def _thoughts(self) -> Reading[None]:
        """Up to and including the closing marker, or to the end of the text."""
        begun = False
        while (yield from self._in.ahead(1)):
            if (yield from self._in.take_literal((self._form.close,))):
                return
            text = self._in.take() + self._in.take_run(self._plain)
            begun = self._think(text, begun=begun)
        self._reasoning += self._space

    def _think(self, text: str, *, begun: bool) -> bool:
        text = self._space + (text if begun else text.lstrip())
        visible = len(text.rstrip())
        keep = max(visible, len(text) - _MAX_HELD_SPACE)
        self._space = text[keep:]
        self._reasoning += text[:keep]
        return begun or bool(keep)
