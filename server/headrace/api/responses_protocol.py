"""The body of /v1/responses, and the chat request that it becomes.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from headrace.api.body import invalid_body, parse_json, read_body
from headrace.api.bounds import FIRST_ERROR, MAX_TOOLS
from headrace.api.field_policy import HARMLESS, REFUSED, Refused, check_extra_fields
from headrace.api.metadata import Metadata, check_metadata
from headrace.api.protocol import (
    MAX_MESSAGES,
    ChatCompletionRequest,
    Int,
    StreamOptions,
)
from headrace.api.resume import FIELD, is_journaled
from headrace.api.services import services_of
from headrace.errors import InvalidRequestError, RequestError, UnsupportedParameterError

TOOL_FIELDS = ("name", "description", "parameters", "strict")
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
"""Accepted, for agents always ask for it: reasoning items come with their text, which carries them
from one request to the next."""

_OF_OTHER_TOOLS = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What `include` may also name: there is never such an output."""


def _check_input(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is dict for item in value):
        if len(value) > MAX_MESSAGES:
            raise ValueError(f"must have at most {MAX_MESSAGES} item(s)")
        return value
    raise ValueError("must be a string or a non-empty array of items")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextConfig(_Part):
    format: dict[str, Any] | None = None
    """text, json_object or json_schema."""
    verbosity: str | None = None


class ReasoningConfig(_Part):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted; the reasoning itself is told, not a summary."""


class ResponsesRequest(_Part):
    """Fields that only this endpoint has, or has in another shape. EXTENSIONS are the others."""

    model: str | None = None
    input: Annotated[
        str | list[dict[str, Any]],
        PlainValidator(_check_input, json_schema_input_type=str | list[dict[str, Any]]),
    ]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[list[str], FIRST_ERROR] | None = None
    max_output_tokens: Int | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: Any = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR, Field(max_length=MAX_TOOLS)] | None = None
    top_logprobs: Int | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    strict_fields: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def check(self) -> None:
        """Raises InvalidRequestError or UnsupportedParameterError for what no type can say."""
        check_metadata(self.metadata)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true.", param="stream_options"
            )
        for index, name in enumerate(self.include or ()):
            check_included(name, param=f"include[{index}]")

    def chat(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        """The chat request that gives this response. Raises as `receive` does."""
        extra = self.model_extra or {}
        fields: dict[str, Any] = {name: extra[name] for name in extra if name in extensions()}
        fields |= {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tools": None if self.tools is None else _chat_tools(self.tools),
            "tool_choice": _chat_tool_choice(self.tool_choice),
        }
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.text is not None:
            fields["response_format"] = _chat_format(self.text.format)
            fields["verbosity"] = self.text.verbosity
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            chat = ChatCompletionRequest.model_validate(given)
        except ValidationError as error:
            raise invalid_body(error) from None
        check_extra_fields(chat.model_extra, strict=False, known=())
        return chat


EXTENSIONS = (
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "return_tokens_as_token_ids",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "top_k",
    "truncate_prompt_tokens",
    "truncation_side",
)
"""Fields of chat requests that mean the same here, where chat has them."""

_ELSEWHERE = Refused("Only /v1/chat/completions takes it.")
_FOR_CHAT = Refused("Use /v1/chat/completions.", (False,))

_REFUSED_HERE: dict[str, Refused] = {
    "access_programs": Refused("Leave it out."),
    "background_options": Refused(
        "Background responses begin at once; leave it out.", ({"completion_window": "soonest"},)
    ),
    "context_management": Refused("Nothing is compacted; use truncation.", ([],)),
    "conversation": Refused("Use previous_response_id."),
    "image": Refused("Only text goes in and out; leave it out."),
    "logprobs": Refused(f"Use top_logprobs, or include {LOGPROBS}.", (False,)),
    "max_completion_tokens": Refused("Call it max_output_tokens."),
    "max_tokens": Refused("Call it max_output_tokens."),
    "messages": Refused("Call it input."),
    "moderation": Refused("Leave it out."),
    "n": Refused("A response has one answer; send the request several times.", (1,)),
    "prompt": Refused("Prompts are not kept here; send instructions and input."),
    "prompt_logprobs": _FOR_CHAT,
    "reasoning.context": Refused("The chat template says what is shown again.", ("auto",)),
    "reasoning.mode": Refused("Leave it out.", ("standard",)),
    "reasoning_effort": Refused("Call it reasoning.effort."),
    "response_format": Refused("Call it text.format.", ({"type": "text"},)),
    "return_token_ids": _FOR_CHAT,
    "verbosity": Refused("Call it text.verbosity.", ("medium",)),
}

# What the fields do, for /openapi.json and docs/api.md. EXTENSIONS do what they do in chat.
RESPONSES_HONOURED: dict[str, str] = {
    "model": "A served name or alias; left out: the default model.",
    "input": "A string, or items: messages of text, function calls and their outputs, reasoning, "
    "references to items that are kept.",
    "instructions": "A system message before all others; not carried over.",
    "previous_response_id": "The conversation goes on from that response, which must be kept.",
    "store": "Kept for 30 days, if the server keeps responses: then the default.",
    "background": "Runs on after the answer, which comes at once; needs store.",
    "stream": "Typed events; there is no [DONE].",
    "stream_options": "include_obfuscation is accepted; no padding is sent.",
    "include": f"{LOGPROBS}; {ENCRYPTED_REASONING} and those of built-in tools add nothing.",
    "max_output_tokens": "Reasoning counts, too; left out: as many as fit.",
    "max_tool_calls": "Counts built-in tools, of which there are none.",
    "metadata": "At most 16 notes; kept and given back.",
    "parallel_tool_calls": "false: calls after the first one are dropped.",
    "reasoning": "effort: as reasoning_effort in chat. summary: accepted, none is made; the "
    "reasoning itself is told.",
    "temperature": "0 (greedy) to 100.",
    "text": "format: text, json_object or json_schema, as response_format in chat. verbosity: "
    "only medium.",
    "tool_choice": "As in chat, in this endpoint's shape.",
    "tools": "Functions, at most 512; strict only if it says so.",
    "top_logprobs": "0 to 20; above 0 it asks for log-probabilities by itself.",
    "top_p": "Above 0, to 1.",
    "truncation": "auto: the oldest turns that do not fit are left out.",
    "user": "Given back.",
    "safety_identifier": "Given back.",
    "prompt_cache_key": "Given back; prefixes are cached without.",
    "strict_fields": "true: unknown fields are refused.",
}


def extensions() -> list[str]:
    return [name for name in EXTENSIONS if name in ChatCompletionRequest.model_fields]


def harmless() -> dict[str, str]:
    """As field_policy.HARMLESS, for this endpoint."""
    of_summary = {"reasoning.generate_summary": "As reasoning.summary."}
    return {name: why for name, why in {**HARMLESS, **of_summary}.items() if name not in _OWN}


def refused() -> dict[str, Refused]:
    """As field_policy.REFUSED, for this endpoint: what only chat takes is in it, too."""
    of_chat = dict.fromkeys(ChatCompletionRequest.model_fields, _ELSEWHERE)
    taken = {*_OWN, *extensions()}
    policies = {**of_chat, **REFUSED, **_REFUSED_HERE}
    return {name: policy for name, policy in policies.items() if name not in taken}


_OWN = frozenset(ResponsesRequest.model_fields)
_EXTENSIONS, _HARMLESS, _REFUSED = frozenset(extensions()), harmless(), refused()


async def receive(request: Request) -> tuple[ResponsesRequest, list[str]]:
    """The body and the names of its unknown fields. Raises what body.receive raises."""
    config = services_of(request).config
    raw = await read_body(request, config.max_body_bytes)
    return parse(raw, strict_fields=config.strict_fields, journaled=is_journaled(request.headers))


def parse(
    raw: bytes, *, strict_fields: bool, journaled: bool = False
) -> tuple[ResponsesRequest, list[str]]:
    """As body.parse_body. `journaled`: by a door, which may send what it has kept of a stream."""
    body = parse_json(ResponsesRequest, raw)
    extra = body.model_extra or {}
    for name in ("reasoning", "text"):
        if (part := getattr(body, name)) is not None:
            more = part.model_extra.items()
            extra = extra | {f"{name}.{inner}": value for inner, value in more}
    ignored = check_extra_fields(
        {name: value for name, value in extra.items() if name not in _EXTENSIONS},
        strict=strict_fields or bool(body.strict_fields),
        known=(*ResponsesRequest.model_fields, *_EXTENSIONS),
        harmless={**_HARMLESS, FIELD: ""} if journaled else _HARMLESS,
        refused=_REFUSED,
    )
    body.check()
    return body, ignored


def check_included(name: str, *, param: str) -> None:
    """Raises for a value of `include` that asks for what is not there."""
    known = (LOGPROBS, ENCRYPTED_REASONING, *_OF_OTHER_TOOLS)
    if name not in known:
        raise InvalidRequestError(
            f"{param}: {name[:64]!r} is unknown; known are: {', '.join(known)}.",
            param=param,
        )


# --- shapes of chat -----------------------------------------------------------------------------


def _chat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shaped = []
    for index, tool in enumerate(tools):
        _check_function(tool, f"tools[{index}]")
        function = {name: tool[name] for name in TOOL_FIELDS if tool.get(name) is not None}
        shaped.append({"type": "function", "function": function})
    return shaped


def _check_function(tool: Any, where: str) -> None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise UnsupportedParameterError(
            f"{where}.type {str(kind)[:64]!r} is not supported: this server has no tools of its "
            "own. Use 'function', and call it yourself.",
            param=f"{where}.type",
        )


def _chat_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools")
        if not isinstance(tools, list):
            raise InvalidRequestError(
                "tool_choice.tools must be an array of tools.", param="tool_choice.tools"
            )
        for index, tool in enumerate(tools):
            _check_function(tool, f"tool_choice.tools[{index}]")
        listed = [{"type": "function", "function": {"name": tool.get("name")}} for tool in tools]
        allowed = {"mode": choice.get("mode", "auto"), "tools": listed}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    raise UnsupportedParameterError(
        f"tool_choice.type {str(kind)[:64]!r} is not supported: use 'none', 'auto', 'required', "
        '{"type": "function", "name": "..."} or {"type": "allowed_tools", ...}.',
        param="tool_choice.type",
    )


def _chat_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") != "json_schema":
        return form
    for name, kind in (("name", str), ("schema", dict)):
        if not isinstance(form.get(name), kind):
            raise InvalidRequestError(
                f"text.format.{name} is required; give it "
                f"{'a string' if kind is str else 'a JSON schema'}.",
                param=f"text.format.{name}",
                code="missing_required_parameter",
            )
    if not isinstance(form.get("description", ""), str | None):
        raise InvalidRequestError(
            "text.format.description must be a string.", param="text.format.description"
        )
    fields = ("name", "description", "schema", "strict")
    schema = {name: form[name] for name in fields if form.get(name) is not None}
    return {"type": "json_schema", "json_schema": schema}


# Names of fields in errors of the chat request -> in this endpoint's. The first match counts.
_RENAMED = (
    (r"max_(completion_)?tokens", "max_output_tokens"),
    (r"response_format(\.json_schema)?", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"verbosity", "text.verbosity"),
    (r"tools\[(?P<i>\d+)\]\.function", r"tools[\g<i>]"),
    (r"tool_choice\.allowed_tools\.tools\[(?P<i>\d+)\]\.function", r"tool_choice.tools[\g<i>]"),
    (r"tool_choice\.(allowed_tools|function)", "tool_choice"),
)


@contextmanager
def own_terms(origins: Sequence[str]) -> Iterator[None]:
    """Around what raises errors in terms of chat. `origins`: for each message the field that it was
    made from."""
    try:
        yield
    except RequestError as error:
        raise _in_own_terms(error, origins) from error


def _in_own_terms(error: RequestError, origins: Sequence[str]) -> RequestError:
    theirs = error.param
    if theirs is None:
        return error
    param, message = theirs, error.message
    if found := re.fullmatch(r"messages(?:\[(\d+)\](.*))?", theirs, re.DOTALL):
        param = _origin(found, origins)
        message = message.replace(theirs, param, 1)
    for pattern, ours in _RENAMED:
        if re.match(rf"{pattern}(?!\w)", theirs):
            param = re.sub(pattern, ours, theirs, count=1)
            message = re.sub(rf"(?<![\w.]){pattern}(?!\w)", ours, message, count=1)
            break
    return error if param == theirs else type(error)(message, param=param, code=error.code)


def _origin(message: re.Match[str], origins: Sequence[str]) -> str:
    index, rest = message[1], message[2] or ""
    if index is None or int(index) >= len(origins):
        return "input"
    origin = origins[int(index)]
    return origin + rest if origin.startswith("input[") else origin
