"""pydantic-ai, which is strict about the fields of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic
import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

WHY = "the extra `clients` is not installed: make .venv/.clients"
pydantic_ai = pytest.importorskip("pydantic_ai", reason=WHY)
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def model_of(target: Target) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=target.v1, api_key="any")
    return OpenAIChatModel(target.model, provider=provider)


def test_an_agent_answers(target: Target) -> None:
    agent = pydantic_ai.Agent(model_of(target), model_settings={"temperature": 0.0})
    result = agent.run_sync("What is the capital of France?")
    assert "Paris" in result.output
    assert result.usage.output_tokens > 3


async def test_an_agent_streams(target: Target) -> None:
    settings: Any = {"temperature": 0.0}
    agent = pydantic_ai.Agent(model_of(target), model_settings=settings)
    async with agent.run_stream("What is the capital of France?") as result:
        parts = [part async for part in result.stream_text(delta=True, debounce_by=None)]
    assert len(parts) > 3 and "Paris" in "".join(parts)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_its_tool(scripted: Scripted, stream: bool) -> None:
    agent = pydantic_ai.Agent(model_of(scripted))
    asked: list[str] = []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    said = 'call weather {"city": "Zürich"}'
    if stream:
        async with agent.run_stream(said) as result:
            output = await result.get_output()
    else:
        output = (await agent.run(said)).output
    assert output == "The tool said: rain" and asked == ["Zürich"]


def test_history_goes_back(scripted: Scripted) -> None:
    agent = pydantic_ai.Agent(model_of(scripted))
    first = agent.run_sync("say one")
    second = agent.run_sync("say two", message_history=first.all_messages())
    assert (first.output, second.output) == ("one", "two")
    assert len(second.all_messages()) == 4


def test_refusals_are_its_own_errors(target: Target) -> None:
    settings: Any = {"temperature": -3.0}
    agent = pydantic_ai.Agent(model_of(target), model_settings=settings)
    with pytest.raises(pydantic_ai.exceptions.ModelHTTPError) as caught:
        agent.run_sync("Hi")
    assert caught.value.status_code == 400 and "temperature" in str(caught.value)


class Place(pydantic.BaseModel):
    kind: Literal["city", "river"]
    is_big: bool


@pytest.mark.parametrize("how", ["NativeOutput", "ToolOutput"])
def test_a_typed_answer(target: Target, how: str) -> None:
    agent = pydantic_ai.Agent(
        model_of(target),
        output_type=getattr(pydantic_ai, how)(Place),
        model_settings={"temperature": 0.0, "max_tokens": 100},
    )
    assert isinstance(agent.run_sync("Paris").output, Place)


def test_responses(scripted: Scripted) -> None:
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=scripted.v1, api_key="any")
    agent = pydantic_ai.Agent(OpenAIResponsesModel(scripted.model, provider=provider))

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    said = 'call weather {"city": "Zürich"}'
    assert agent.run_sync(said).output == "The tool said: rain in Zürich"
