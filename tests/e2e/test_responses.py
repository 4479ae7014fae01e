"""/v1/responses of the default model through the official client."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"
TINY = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB", "--chat-template")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **{"model": "SmolLM2-135M-Instruct", "temperature": 0, "max_output_tokens": 30, **fields}
    )


def test_a_conversation(client: openai.OpenAI) -> None:
    first = ask(client, input=QUESTION)
    assert "Paris" in first.output_text and first.usage.output_tokens > 3
    second = ask(client, input="And of Italy?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    again = ask(
        client,
        input=[
            {"role": "user", "content": QUESTION},
            *first.output,
            {"role": "user", "content": "And of Italy?"},
        ],
        store=False,
    )
    assert again.output_text == second.output_text
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(second.id).output_text == second.output_text
    [item] = client.responses.input_items.list(second.id)
    assert item.type == "message"
    client.responses.delete(second.id)


def test_a_stream_is_the_same(client: openai.OpenAI) -> None:
    whole = ask(client, input=QUESTION)
    with client.responses.stream(
        model="SmolLM2-135M-Instruct", input=QUESTION, temperature=0, max_output_tokens=30
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == whole.output_text


def test_in_the_background(server: Server, client: openai.OpenAI) -> None:
    whole = ask(client, input=QUESTION)
    queued = ask(client, input=QUESTION, background=True)
    assert queued.status == "queued"

    def ended() -> Any:
        found = client.responses.retrieve(queued.id)
        return found if found.status == "completed" else None

    assert server.wait_for(ended, "the response").output_text == whole.output_text
    long = ask(
        client,
        input=QUESTION,
        background=True,
        max_output_tokens=1000,
        extra_body={"ignore_eos": True},
    )
    assert client.responses.cancel(long.id).status == "cancelled"
    server.wait_idle()


class Country(BaseModel):
    name: str
    capital: str


def test_forced_shapes(client: openai.OpenAI) -> None:
    """Whatever a small model means, the result parses."""
    model, question = "SmolLM2-135M-Instruct", "Name a country and its capital."
    parsed = client.responses.parse(
        model=model, input=question, text_format=Country, temperature=0, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, Country)
    tool = openai.pydantic_function_tool(Country, name="note")["function"]
    called = client.responses.create(
        model=model,
        input=question,
        tools=[{"type": "function", **tool}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=200,
    )
    [call] = called.output
    assert call.type == "function_call" and call.status == "completed"
    Country.model_validate_json(call.arguments, strict=True)


async def test_several_at_once(server: Server) -> None:
    async with server.async_client() as client:
        answers = await asyncio.gather(
            *(
                client.responses.create(
                    model="SmolLM2-135M-Instruct",
                    input=QUESTION,
                    temperature=0,
                    max_output_tokens=8,
                )
                for _ in range(4)
            )
        )
    assert len({answer.output_text for answer in answers}) == 1


@pytest.mark.slow  # a lease has to run out
def test_a_restart(start_server: StartServer, tiny_model: Path, tmp_path: Path) -> None:
    """What has ended is there again; what was being made has failed."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = (tiny_model, *TINY, template, "--data-dir", tmp_path / "data")
    first = start_server(*options)
    fields: Any = {"model": "tiny", "extra_body": {"ignore_eos": True}}
    with first.client() as client:
        done = client.responses.create(input="Hi", max_output_tokens=4, **fields)
        running = client.responses.create(input="Hi", background=True, **fields)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = start_server(*options)
    with second.client() as client:
        assert client.responses.retrieve(done.id).output_text == done.output_text

        def failed() -> Any:
            found = client.responses.retrieve(running.id)
            return found if found.status == "failed" else None

        ended = second.wait_for(failed, "the failure")
    assert ended.error is not None and "send it again" in ended.error.message
