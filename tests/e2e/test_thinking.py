"""A budget of thinking over HTTP, on a small random model that would think for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ tools }}<tool_call>"
    "{% if add_generation_prompt %}<think>{% endif %}{# </think> #}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.fixture
def thinking_server(tiny_model: Path, tmp_path: Path, start_server: StartServer) -> Server:
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_model, folder)
    tokenizer = (folder / "tokenizer.json").read_text()
    for marker, token in (("<think>", "<|start|>"), ("</think>", "<|pad|>")):
        assert token in tokenizer
        tokenizer = tokenizer.replace(token, marker)
    (folder / "tokenizer.json").write_text(tokenizer)
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return start_server(folder, "--threads", "1", "--kv-cache-memory-bytes", "64MiB")


def test_thinking_ends_in_time_and_a_call_follows(thinking_server: Server) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "thinking_token_budget": 20,
        "max_tokens": 400,
        "n": 4,
        "seed": 1,
    }
    answer = thinking_server.post("/v1/chat/completions", body).json()
    assert "choices" in answer, answer
    for choice in answer["choices"]:
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = message["tool_calls"]
        assert call["function"]["name"] == "weather"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    details = answer["usage"]["completion_tokens_details"]
    # A character of several bytes is finished before the end is forced.
    assert 21 < details["reasoning_tokens"] <= 4 * 24

    free = {"messages": body["messages"], "max_tokens": 60, "seed": 1, "ignore_eos": True}
    free |= {"logit_bias": {"257": -100}, "return_token_ids": True}  # </think> never on its own
    [unbound] = thinking_server.post("/v1/chat/completions", free).json()["choices"]
    free["thinking_token_budget"] = 20
    [bound] = thinking_server.post("/v1/chat/completions", free).json()["choices"]
    assert 257 not in unbound["token_ids"] and bound["token_ids"].count(257) == 1
    assert bound["token_ids"][:21] == [*unbound["token_ids"][:20], 257]
    assert unbound["message"]["content"] is None and bound["message"]["content"]
