"""Renders a model's Jinja chat template the way Hugging Face does, in a sandbox with limits.

A template comes with the model files, so it is not trusted: it can neither reach Python's
internals, nor loop without end, nor make a text without end.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import CheckpointError, InvalidRequestError

MAX_STEPS = 200_000  # loop rounds in one rendering; a thousand-message chat takes a few thousand
MAX_CHARACTERS = 64 * 2**20
MAX_REASON = 500  # characters of what the template says
MAX_SECONDS = 10.0  # in loops and macros; a thousand-message chat takes some 50 ms
_WIDE_FORMAT = re.compile(r"\d{6}|\*")
_RESERVED = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"}
)


class ChatTemplate:
    """One compiled template. `source` is the template, or several by name as some models have
    them, of which "default" is used. Raises CheckpointError if it does not compile."""

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        with_tools = None
        if not isinstance(source, str):
            with_tools = source.get("tool_use")
            source = _default_of(source)
        self.source = source
        self.tool_source = with_tools or source
        """The template that a conversation with tools goes through."""
        self._special_tokens = dict(special_tokens or {})
        self._knows_developer_role = "developer" in source
        try:
            self._template = _Sandbox().from_string(source)
            self._tool_template = _Sandbox().from_string(self.tool_source)
            trees = [_Sandbox().parse(text) for text in (source, self.tool_source)]
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"The model's chat template does not compile: {error}") from error
        loaded = [
            {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
            for tree in trees
        ]
        self.variables = frozenset().union(*loaded)
        """All names that are looked up in it."""
        self.takes_tools = "tools" in loaded[1]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages` (each with "role" and "content"; tool calls and `tools` in
        OpenAI's shape).

        `continue_final_message` ends the prompt inside the last message, for the model to go on
        writing it. `kwargs` are further variables for the template. Raises InvalidRequestError
        with what the template objects to.
        """
        if reserved := _RESERVED.intersection(kwargs or ()):
            name = min(reserved)
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name!r}, which the server sets itself.",
                param=f"chat_template_kwargs.{name}",
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other; "
                "set add_generation_prompt to false.",
                param="continue_final_message",
            )
        conversation = [_with_parsed_arguments(self._with_known_role(m)) for m in messages]
        variables: dict[str, Any] = {
            "tools": None,
            "documents": None,
            **(kwargs or {}),
            **self._special_tokens,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            variables["tools"] = list(tools)
        text = self._run(self._tool_template if tools else self._template, variables)
        return _cut_after_final_message(text, conversation) if continue_final_message else text

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(variables, **_limited_loops()):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise _LimitError(f"it makes more than {MAX_CHARACTERS} characters")
        except _RaisedByTemplateError as error:
            raise _refused(str(error)) from error
        except jinja2.TemplateError as error:
            raise _refused(f"it fails with: {error}") from error
        except RecursionError as error:
            raise _refused("it is nested too deeply") from error
        except MemoryError as error:
            raise _refused("it makes too much of a text") from error
        except (_LimitError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise _refused(f"it fails with: {error}") from error
        text = "".join(pieces)
        if not _is_unicode(text):
            raise _refused("it writes half of a surrogate pair, which is no character")
        return text

    def _with_known_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's "developer" is its newer name for "system", which templates know."""
        if message["role"] == "developer" and not self._knows_developer_role:
            return {**message, "role": "system"}
        return dict(message)


class _JSONObject(dict[str, Any]):
    """A call's arguments. Most templates take an object, some add it to a string: there it is the
    JSON text that it came from."""

    def __init__(self, text: str, value: Mapping[str, Any]) -> None:
        super().__init__(value)
        self._json = text

    def __str__(self) -> str:
        return self._json

    def __add__(self, after: str) -> str:
        return self._json + after

    def __radd__(self, before: str) -> str:
        return before + self._json


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are no JSON object stay the string that they are: models write such."""
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_with_object(call) for call in calls]
    return message


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = function["arguments"]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        function = {**function, "arguments": _JSONObject(text, value)}
    return {**call, "function": function}


class _RaisedByTemplateError(jinja2.TemplateError):
    """The template called raise_exception."""


class _LimitError(Exception):
    pass


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` marks what training learns; it renders as is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with each round of a loop and call of a macro counted and no large
    repetition."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        # Macros, too: they can call themselves.
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(block, nodes.For | nodes.Macro | nodes.CallBlock)
            count = nodes.Call(nodes.Name("__count_step", "load"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(count).set_lineno(block.lineno))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | list | tuple):
                if len(value) * times > MAX_STEPS:
                    raise _LimitError("it repeats a text too often")
            elif operator == "**" and isinstance(value, int | float) and abs(value) > 1000:
                raise _LimitError("it computes too large a power")
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise _LimitError("it pads a text too widely")
        return super().call_binop(context, operator, left, right)


def _limited_loops() -> dict[str, Callable[[], None]]:
    left = MAX_STEPS
    deadline = time.monotonic() + MAX_SECONDS

    def count_step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _LimitError(f"it loops more than {MAX_STEPS} times")
        if time.monotonic() > deadline:
            raise _LimitError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    return {"__count_step": count_step}


def _default_of(templates: Mapping[str, str]) -> str:
    if "default" in templates:
        return templates["default"]
    if len(templates) == 1:
        return next(iter(templates.values()))
    raise CheckpointError(
        f"The model has the chat templates {sorted(templates)} and none named 'default'."
    )


def _cut_after_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Templates may trim a message, so the last message is looked for without outer spaces; its
    own trailing spaces stay out of the prompt then."""
    content = str(messages[-1]["content"])
    start = text.rfind(content.strip())
    if start < 0 or not content.strip():
        raise InvalidRequestError(
            "continue_final_message needs a last message whose text the chat template keeps as "
            "it is; this template changes it.",
            param="continue_final_message",
        )
    exact = text.rfind(content)
    return text[: exact + len(content)] if exact >= 0 else text[: start + len(content.strip())]


def _is_unicode(text: str) -> bool:
    """Not so where an escape of a call's arguments, or of the template, is half of a pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _refused(reason: str) -> InvalidRequestError:
    # What the template says may be anything.
    readable = reason[:MAX_REASON].encode(errors="backslashreplace").decode()
    return InvalidRequestError(
        f"The model's chat template does not take these messages: {readable}.", param="messages"
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
