"""What tests of /v1/responses share: OpenAI's own types, strictly."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

RESPONSES = "/v1/responses"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{}</tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "name": name, "description": f"Does {name}", "parameters": PARAMETERS}
    for name in ("f", "g")
]
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def strictly(kind: type[BaseModel], raw: bytes | str) -> Any:
    """Valid by OpenAI's own types, without any conversion."""
    return kind.model_validate_json(raw, strict=True)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each checked against OpenAI's types, and numbered one by one."""
    events = []
    blocks = text.removesuffix("\n\n").split("\n\n")
    for block in (block for block in blocks if not block.startswith(":")):
        name, data = block.split("\n")
        event = _EVENTS.validate_json(data.removeprefix("data: "), strict=True)
        fields = json.loads(data.removeprefix("data: "))
        assert type(event).model_fields["type"].annotation.__args__ == (fields["type"],)
        assert name == f"event: {fields['type']}"
        events.append(fields)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types in order, deltas of one kind in a row as one."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if not (found and found[-1] == kind and kind.endswith(".delta")):
            found.append(kind)
    return found


def prompt_of(site: Any, index: int = -1) -> str:
    """What the model saw in one of its requests."""
    token_ids = site.engine.requests[index].prompt_token_ids
    return str(site.engine.tokenizer.decode(token_ids, skip_special_tokens=False))
