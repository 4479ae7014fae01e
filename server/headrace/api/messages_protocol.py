"""The bodies of /v1/messages and /v1/messages/count_tokens, and what happens to each field.

https://platform.claude.com/docs/en/api/messages; the types are those of anthropic-python.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from headrace.api.bounds import FIRST_ERROR, MAX_TOOLS
from headrace.api.field_policy import HARMLESS as HARMLESS_IN_CHAT
from headrace.api.field_policy import REFUSED as REFUSED_IN_CHAT
from headrace.api.field_policy import Refused
from headrace.api.protocol import MAX_MESSAGES, Int, Stop

Blocks = list[dict[str, Any]]


def _check_content(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(block, dict) for block in value):
        return value
    raise ValueError("must be a string or an array of content blocks")


Content = Annotated[str | Blocks, BeforeValidator(_check_content)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class InputMessage(_Body):
    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(_Body):
    type: Annotated[str, Field(max_length=64)] | None = None
    """Absent, null or "custom"; tools of other types are refused by name."""
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    """A JSON schema of type object."""
    strict: bool | None = None


class ToolChoice(_Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(_Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(_Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(_Body):
    """What makes the prompt."""

    model: str | None = None
    messages: Annotated[
        list[InputMessage], FIRST_ERROR, Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    system: Content | None = None
    tools: Annotated[list[CustomTool], FIRST_ERROR, Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Extensions
    chat_template_kwargs: dict[str, Any] | None = None
    strict_fields: bool | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    stop_sequences: Stop = ()
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    # Extensions
    min_p: float | None = None
    seed: Int | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


# The fields of the models: what they do. For /openapi.json and docs/api.md.
HONOURED: dict[str, str] = {
    "model": "A served name or alias; left out: the default model.",
    "messages": "Text, tool_use, tool_result and thinking blocks. Turns of one role that follow "
    "each other are one; the answer continues a last one of the assistant.",
    "system": "A string or text blocks.",
    "max_tokens": "At most what the context holds. 0: the prompt is cached and nothing written.",
    "stop_sequences": "At most 64 strings of at most 1024 characters.",
    "stream": "Server-sent events as Anthropic's.",
    "temperature": "0 (greedy) to 100.",
    "top_p": "Above 0, to 1.",
    "top_k": "0 or -1: no limit.",
    "tools": "Custom tools, at most 512; those that Anthropic defines are refused.",
    "tool_choice": "auto, any, tool or none, with disable_parallel_tool_use.",
    "thinking": "Sets enable_thinking for the chat template, and a limit to what is thought.",
    "output_config": "format: json_schema. effort: where the chat template knows reasoning_effort.",
    "min_p": "0 to 1: least probability, as a part of the likeliest token's.",
    "seed": "Repeats the output exactly.",
    "priority": "Lower is served first.",
    "cache_salt": "Prefixes are shared only with requests of the same salt.",
    "chat_template_kwargs": "Further variables for the chat template.",
    "strict_fields": "true: unknown fields are refused.",
}

# Accepted: the value changes no output. Why it does not.
HARMLESS: dict[str, str] = {
    "cache_control": "Prefixes are always cached; the same on blocks and tools.",
    "inference_geo": "The model runs where the server does.",
    "metadata": "Who asks; the API key decides what is allowed.",
    "user_profile_id": HARMLESS_IN_CHAT["user"],
    "workspace_id": "There is one.",
}

_CLEARS_NOTHING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

REFUSED: dict[str, Refused] = {
    "billing_policy": Refused("Nothing is billed; leave it out."),
    "compaction": Refused("Shorten the conversation before it is sent."),
    "container": Refused("There are no server tools; leave it out."),
    "context_management": Refused(
        "Shorten the conversation before it is sent.", ({}, {"edits": []}, _CLEARS_NOTHING)
    ),
    "diagnostics": Refused("usage tells how much of the prompt was cached."),
    "fallback_credit_token": Refused("Leave it out."),
    "fallbacks": Refused("Ask for one model.", ([],)),
    "headrace_resume": REFUSED_IN_CHAT["headrace_resume"],
    "mcp_servers": Refused("Call them in the client, and give their tools as tools.", ([],)),
    "output_format": Refused("Use output_config.format."),
    "service_tier": Refused("There is one tier.", ("auto", "standard_only")),
    "speed": Refused("There is one speed.", ("standard",)),
    "thread": Refused("Send the whole conversation, as clients do that read the error's details."),
}

# The same inside of tools; the other fields there change no output.
REFUSED_IN_TOOLS: dict[str, Refused] = {
    "allowed_callers": Refused("Only the model itself calls tools.", (["direct"],)),
    "defer_loading": Refused("Give the tools that are needed.", (False,)),
    "input_examples": Refused("Put them into the description.", ([],)),
}
