"""Tool calls in a model's output: what they look like, by format, and which format a model has.

The formats are data; tool_calls_reader.py reads them all.
"""

from __future__ import annotations

import hashlib
import secrets
import string
from dataclasses import dataclass
from typing import Literal, NamedTuple

from headrace.errors import ConfigError


class Content(NamedTuple):
    """Text of the answer that is no call."""

    text: str


class CallStart(NamedTuple):
    """A call begins. Its arguments follow, then CallEnd or CallBroken."""

    id: str
    name: str


class Arguments(NamedTuple):
    """More of the arguments' JSON text."""

    text: str


class CallEnd(NamedTuple):
    """All that came since CallStart is one JSON object."""


class CallBroken(NamedTuple):
    """The call that began is none. `text` is all that was read of it."""

    text: str


Piece = Content | CallStart | Arguments | CallEnd | CallBroken


@dataclass(frozen=True)
class ToolCallFormat:
    """How one family of models writes its calls.

    json: objects with a name and arguments (or parameters), alone or in an array.
    pythonic: `[name(argument=literal), ...]`.
    """

    name: str
    begin: tuple[str, ...] = ()
    """What announces calls, anywhere in the text. Here and below: longest first."""
    end: tuple[str, ...] = ()
    """What may close them."""
    syntax: Literal["json", "pythonic"] = "json"
    bare: bool = False
    """The text may also begin with a call that nothing announces."""
    fences: tuple[str, ...] = ()
    """What may stand before such a call."""
    separator: str = ""
    """What may stand between calls outside of an array."""
    bare_names: bool = False
    """After `begin` may stand a name, markers as of Mistral's tokenizer, and the arguments."""
    arguments_key: str = "arguments"
    """As the family's prompts call them. Readers take all of ARGUMENTS_KEYS."""
    array: bool = False
    """Behind the first `begin` stands an array of all calls."""
    short_ids: bool = False
    """Mistral's templates take ids of nine letters and digits only."""

    @property
    def is_python(self) -> bool:
        return self.syntax == "pythonic"

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and have to be in the text all the same."""
        names = (CALL_ID, ARGS) if self.bare_names else ()
        return (*self.begin, *self.end, *names)

    def new_id(self) -> str:
        if self.short_ids:
            return "".join(secrets.choice(_SHORT_ID_CHARACTERS) for _ in range(_SHORT_ID_LENGTH))
        return f"call_{secrets.token_hex(12)}"

    def template_id(self, call_id: str) -> str:
        """The id of a call as templates take it: equal for equal ids, whoever made them."""
        fits = len(call_id) == _SHORT_ID_LENGTH and set(call_id) <= set(_SHORT_ID_CHARACTERS)
        if fits or not self.short_ids:
            return call_id
        digest = hashlib.blake2b(call_id.encode(errors="replace")).hexdigest()
        return digest[:_SHORT_ID_LENGTH]


_SHORT_ID_LENGTH = 9
_SHORT_ID_CHARACTERS = string.ascii_letters + string.digits

CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
ARGUMENTS_KEYS = ("arguments", "parameters")

_TAG, _END_TAG = "<tool_call>", "</tool_call>"

GENERIC = ToolCallFormat(
    "generic",
    begin=(_TAG,),
    end=(_END_TAG, "```"),
    bare=True,
    fences=("```json", "```"),
)
"""What the server itself asks for where a template cannot: see tool_calls_prompt.py."""

FORMATS = {
    form.name: form
    for form in (
        ToolCallFormat("hermes", begin=(_TAG,), end=(_END_TAG,)),
        ToolCallFormat(
            "llama3_json",
            begin=("<|python_tag|>",),
            bare=True,
            separator=";",
            arguments_key="parameters",
        ),
        ToolCallFormat(
            "mistral", begin=("[TOOL_CALLS]",), bare_names=True, array=True, short_ids=True
        ),
        ToolCallFormat(
            "pythonic",
            begin=("<|python_start|>",),
            end=("<|python_end|>",),
            syntax="pythonic",
            bare=True,
        ),
        ToolCallFormat(
            "granite",
            begin=("<|tool_call|>", _TAG),
            end=("<|/tool_call|>", _END_TAG),
            array=True,
        ),
        GENERIC,
    )
}

# Text in a chat template that has tools -> the format it teaches. The first that is there decides.
# XML in place of JSON (Qwen3-Coder, GLM) is not read: such models are asked for the generic format.
_TOLD_BY: tuple[tuple[str, str], ...] = (
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
    ("<function=", "generic"),
    ("<arg_key>", "generic"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
)


def tool_call_format(name: str, template: str, *, takes_tools: bool) -> ToolCallFormat | None:
    """The format of --tool-call-parser `name`; for "auto" what the template's text tells, and the
    generic one where it tells nothing or takes no tools. "none": None.

    Raises ConfigError for an unknown name.
    """
    if name == "none":
        return None
    if name == "auto":
        found = (told for mark, told in _TOLD_BY if mark in template)
        return FORMATS[next(found, "generic") if takes_tools else "generic"]
    if name not in FORMATS:
        known = ", ".join(("auto", "none", *FORMATS))
        raise ConfigError(f"--tool-call-parser {name!r} is not one of {known}.")
    return FORMATS[name]
