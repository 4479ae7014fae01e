"""The default model through Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anthropic
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
BODY: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 40,
    "messages": QUESTION,
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def test_a_message_and_its_stream(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**BODY, system="You are a helpful assistant.")
    [block] = message.content
    assert block.type == "text" and "Paris" in block.text
    assert message.stop_reason == "end_turn"
    with claude.messages.stream(**BODY, system="You are a helpful assistant.") as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == block.text
    total = streamed.usage.input_tokens + (streamed.usage.cache_read_input_tokens or 0)
    counted = claude.messages.count_tokens(
        model=MODEL, messages=QUESTION, system="You are a helpful assistant."
    )
    assert counted.input_tokens == total
    assert (streamed.usage.cache_read_input_tokens or 0) > 0, "the same prompt came before"


def test_a_stop_sequence(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**BODY, stop_sequences=["Paris"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")
    assert all(block.type == "text" and "Paris" not in block.text for block in message.content)


def test_tools_reach_the_model(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "look_up", "input_schema": {"type": "object", "properties": {}}}
    plain = claude.messages.count_tokens(model=MODEL, messages=QUESTION)
    told = claude.messages.count_tokens(model=MODEL, messages=QUESTION, tools=[tool])
    assert told.input_tokens > plain.input_tokens
    message = claude.messages.create(**BODY, tools=[tool])
    assert message.stop_reason in ("end_turn", "max_tokens", "tool_use")
