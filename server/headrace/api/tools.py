"""What a chat request lets the model do with tools, checked, and what its answer must then look
like.

https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from headrace.api.protocol import ChatCompletionRequest, Tool
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.text.tool_calls import ToolCallFormat


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request."""

    form: ToolCallFormat
    tools: list[dict[str, Any]]
    """As chat templates take them: OpenAI's shape, without nulls."""
    callable: dict[str, Tool]
    """Those that may be called, by name."""
    max_calls: int | None
    forced: bool = False
    """The answer must be a call."""
    named: bool = False
    """It must be a call of the one tool that may be called."""

    @property
    def constrained(self) -> bool:
        """Whether calls must match their schemas."""
        return self.forced or any(tool.function.strict for tool in self.callable.values())

    def beside(self, *, format_is_asked_for: bool) -> ToolUse:
        """The same, to be read from an answer that has a format of its own if it is no call.

        Only what the format's marker announces is a call there, for content may look like one. So
        it is where calls are constrained and the marker is what the model was told to write.
        """
        marked = format_is_asked_for or (self.constrained and self.form.fences)
        if self.forced or not marked or not self.form.bare:
            return self
        return dataclasses.replace(self, form=dataclasses.replace(self.form, bare=False))


def tool_use(body: ChatCompletionRequest, form: ToolCallFormat | None) -> ToolUse | None:
    """None when no tool may be called. `form`: how the model writes calls, None if it cannot.

    Raises InvalidRequestError for what contradicts itself, UnsupportedParameterError for what the
    server or the model cannot do.
    """
    tools = _by_name(body.tools or [])
    mode, names = _choice(body.tool_choice, tools)
    if not tools or mode == "none":
        return None
    if form is None:
        raise UnsupportedParameterError(
            "This server reads no tool calls: it was started with --tool-call-parser none. Leave "
            'tools out, or set tool_choice to "none".',
            param="tools",
        )
    return ToolUse(
        form=form,
        tools=template_tools(body.tools),
        callable=tools if names is None else {name: tools[name] for name in names},
        max_calls=1 if mode == "named" or body.parallel_tool_calls is False else None,
        forced=mode in ("required", "named"),
        named=mode == "named",
    )


def template_tools(tools: list[Tool] | None) -> list[dict[str, Any]]:
    """As chat templates take them: OpenAI's shape, without nulls."""
    functions = (tool.function.model_dump() for tool in tools or ())
    return [
        {
            "type": "function",
            "function": {key: value for key, value in function.items() if value is not None},
        }
        for function in functions
    ]


# --- checks -------------------------------------------------------------------------------------


def _by_name(tools: list[Tool]) -> dict[str, Tool]:
    named: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in named:
            raise InvalidRequestError(
                f"tools[{index}].function.name {name!r} is there twice; every tool needs a name of "
                "its own.",
                param=f"tools[{index}].function.name",
            )
        named[name] = tool
        _check_schema(tool.function.parameters, f"tools[{index}].function.parameters")
    return named


def _check_schema(schema: dict[str, Any] | None, where: str) -> None:
    """The parts of a parameters schema that templates walk through."""
    if not schema:
        return
    properties = schema.get("properties")
    required = schema.get("required")
    if schema.get("type", "object") != "object":
        problem, path = 'must be "object": arguments are an object', f"{where}.type"
    elif properties is not None and not _is_schemas(properties):
        problem, path = "must be an object of JSON schemas", f"{where}.properties"
    elif required is not None and not _is_strings(required):
        problem, path = "must be an array of strings", f"{where}.required"
    else:
        return
    raise InvalidRequestError(f"{path} {problem}.", param=path)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, dict | bool) for v in value.values())


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _choice(choice: Any, tools: dict[str, Tool]) -> tuple[str, list[str] | None]:
    """The mode (none, auto, required or named), and the names of the tools that may be called where
    they are not all."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            raise _without_tools()
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "named", [_named(choice, tools, "tool_choice")]
    allowed = choice.get("allowed_tools") if kind == "allowed_tools" else None
    if isinstance(allowed, dict) and isinstance(listed := allowed.get("tools"), list):
        where = "tool_choice.allowed_tools"
        if (mode := allowed.get("mode", "auto")) not in ("auto", "required"):
            raise InvalidRequestError(
                f'{where}.mode must be "auto" or "required".', param=f"{where}.mode"
            )
        if not listed:
            raise InvalidRequestError(f"{where}.tools must name a tool.", param=f"{where}.tools")
        return mode, [
            _named(item, tools, f"{where}.tools[{index}]") for index, item in enumerate(listed)
        ]
    raise InvalidRequestError(
        'tool_choice must be "none", "auto", "required", {"type": "function", "function": '
        '{"name": "..."}} or {"type": "allowed_tools", ...}.',
        param="tool_choice",
    )


def _named(choice: Any, tools: dict[str, Tool], where: str) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequestError(
            f"{where}.function.name is required; name one of the tools.",
            param=f"{where}.function.name",
            code="missing_required_parameter",
        )
    if not tools:
        raise _without_tools()
    if name not in tools:
        raise InvalidRequestError(
            f"{where}.function.name {name[:64]!r} is none of the tools; there are "
            f"{', '.join(list(tools)[:32])}.",
            param=f"{where}.function.name",
        )
    return name


def _without_tools() -> InvalidRequestError:
    return InvalidRequestError(
        "tool_choice asks for a call and there are no tools; give tools, or leave it out.",
        param="tool_choice",
    )
