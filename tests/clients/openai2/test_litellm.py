"""litellm, which many gateways and agents are built on."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(target: Any, **more: Any) -> Any:
    arguments = {"messages": QUESTION, "num_retries": 0, "max_retries": 0, **more}
    return litellm.completion(
        model=f"openai/{target.model}", api_base=target.v1, api_key="any", **arguments
    )


def test_completion_and_stream(target: Any) -> None:
    answer = ask(target, temperature=0)
    text = answer.choices[0].message.content
    assert "Paris" in text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 3
    chunks = list(ask(target, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    rebuilt = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert rebuilt.choices[0].message.content == text
    assert rebuilt.usage.completion_tokens == answer.usage.completion_tokens


async def test_async(target: Any) -> None:
    answer = await litellm.acompletion(
        model=f"openai/{target.model}",
        api_base=target.v1,
        api_key="any",
        messages=QUESTION,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content


def test_text_completion(target: Any) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{target.model}",
        api_base=target.v1,
        api_key="any",
        prompt="The capital of France is",
        max_tokens=5,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_tools(scripted: Any, stream: bool) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    said: list[Any] = [{"role": "user", "content": 'call f {"a": "ü"}\ncall f {"b": 2}'}]
    arguments: Any = {"messages": said, "tools": [{"type": "function", "function": function}]}
    answer = ask(scripted, **arguments, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=said)
    message = answer.choices[0].message
    calls = [json.loads(call.function.arguments) for call in message.tool_calls]
    assert calls == [{"a": "ü"}, {"b": 2}]
    assert answer.choices[0].finish_reason == "tool_calls"
    said += [
        message.model_dump(),
        *({"role": "tool", "tool_call_id": c.id, "content": "done"} for c in message.tool_calls),
    ]
    assert ask(scripted, **arguments).choices[0].message.content == "The tool said: done"


def test_errors(target: Any, scripted: Any) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(target, temperature=-3)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(target, messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(
            model="openai/gpt-17", api_base=target.v1, api_key="any", messages=QUESTION
        )
    busy = [{"role": "user", "content": "busy litellm-1 say at last"}]
    with pytest.raises(litellm.RateLimitError):
        ask(scripted, messages=busy)
    busy = [{"role": "user", "content": "busy litellm-2 say at last"}]
    answer = ask(scripted, messages=busy, num_retries=1)
    assert answer.choices[0].message.content == "at last"
