"""What a chat request lets the model do with tools, checked, and what its answer must then look
like.

https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.api.protocol import ChatCompletionRequest, Tool
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.text.tool_calls import GENERIC, ToolCallFormat

MAX_TOOLS = 512


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request."""

    form: ToolCallFormat
    tools: list[dict[str, Any]]
    """As chat templates take them: OpenAI's shape, without nulls."""
    callable: dict[str, Tool]
    """Those that may be called, by name."""
    max_calls: int | None
    forced: bool
    """The answer must be a call."""

    @property
    def strict(self) -> str | None:
        """The first tool whose arguments must match its schema."""
        return next((name for name, tool in self.callable.items() if tool.function.strict), None)


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
    use = ToolUse(
        form=form,
        tools=template_tools(body.tools),
        callable=tools if names is None else {name: tools[name] for name in names},
        max_calls=1 if body.parallel_tool_calls is False else None,
        forced=mode == "required",
    )
    _refuse_what_needs_constraints(use)
    return use


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


def _refuse_what_needs_constraints(use: ToolUse) -> None:
    """Until decoding is constrained by `call_constraint`."""
    if use.forced:
        raise UnsupportedParameterError(
            "tool_choice cannot force a call yet: that needs constrained decoding. Use "
            '"auto", and ask for the call in a message.',
            param="tool_choice",
        )
    if use.strict is not None:
        raise UnsupportedParameterError(
            f"The tool {use.strict!r} is strict, which is not supported yet: that needs "
            "constrained decoding. Leave strict out or set it to false.",
            param="tools",
        )


# --- what an answer with forced or strict tools must look like ----------------------------------


@dataclass(frozen=True, slots=True)
class CallConstraint:
    """Text that must be JSON of `schema` between `begin` and `end`.

    `required`: the answer is nothing but that. Otherwise it is free until `begin` is written.
    `repeats`: it may come several times, with `separator` in between.
    """

    begin: str
    schema: dict[str, Any]
    end: str
    required: bool
    repeats: bool
    separator: str = ""


def call_constraint(use: ToolUse) -> CallConstraint | None:
    """What decoding must be constrained to; None if to nothing.

    Formats that are not JSON are forced in the generic one, which `use.form` has to be then, too.
    """
    if not use.forced and use.strict is None:
        return None
    form = use.form if use.form.syntax == "json" else GENERIC
    schema = calls_schema(list(use.callable.values()), form.arguments_key)
    several = use.max_calls is None
    if form.bare_names:  # an array holds all calls
        definitions = schema.pop("$defs", {})
        schema = {"type": "array", "items": schema, "minItems": 1, "$defs": definitions}
        if not several:
            schema["maxItems"] = 1
        return CallConstraint(form.begin[0], schema, "", use.forced, repeats=False)
    if not form.end:
        begin = "" if use.forced else form.begin[0]
        return CallConstraint(begin, schema, "", use.forced, several, f"{form.separator} ")
    return CallConstraint(
        f"{form.begin[0]}\n", schema, f"\n{form.end[0]}", use.forced, several, "\n"
    )


def calls_schema(tools: list[Tool], arguments_key: str = "arguments") -> dict[str, Any]:
    """The JSON schema of one call of one of `tools`: name first, then arguments."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        function = tool.function
        parameters = dict(function.parameters or {"type": "object"})
        for keyword in ("$defs", "definitions"):
            for name, definition in (parameters.pop(keyword, None) or {}).items():
                definitions[f"{function.name}.{name}"] = _with_refs(definition, function.name)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    arguments_key: _with_refs(parameters, function.name),
                },
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _with_refs(schema: Any, tool: str) -> Any:
    """References into the definitions of one tool, where those of all stand together."""
    if isinstance(schema, list):
        return [_with_refs(item, tool) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _with_refs(value, tool) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str):
        for keyword in ("#/$defs/", "#/definitions/"):
            if reference.startswith(keyword):
                moved["$ref"] = f"#/$defs/{tool}.{reference.removeprefix(keyword)}"
    return moved


# --- checks -------------------------------------------------------------------------------------


def _by_name(tools: list[Tool]) -> dict[str, Tool]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools must have at most {MAX_TOOLS} items.", param="tools")
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
    """The mode, and the names of the tools that may be called where they are not all."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            raise _without_tools()
        return choice, None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "required", [_named(choice, tools, "tool_choice")]
    allowed = choice.get("allowed_tools") if kind == "allowed_tools" else None
    if isinstance(allowed, dict) and isinstance(listed := allowed.get("tools"), list):
        where = "tool_choice.allowed_tools"
        if (mode := allowed.get("mode", "auto")) not in ("auto", "required"):
            raise InvalidRequestError(
                f'{where}.mode must be "auto" or "required".', param=f"{where}.mode"
            )
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
