"""langchain-openai."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from tests.clients.conftest import Scripted, Target

WHY = "the extra `clients` is not installed: make .venv/.clients"
langchain_openai = pytest.importorskip("langchain_openai", reason=WHY)
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def chat(target: Target, **options: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        model=target.model, base_url=target.v1, api_key="any", max_retries=0, **options
    )


def test_invoke_stream_and_batch(target: Target) -> None:
    model = chat(target, temperature=0)
    answer = model.invoke("What is the capital of France?")
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 3
    chunks = list(model.stream("What is the capital of France?"))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert len(chunks) > 3
    together = model.batch(["What is the capital of France?"] * 3)
    assert [one.content for one in together] == [answer.content] * 3


def test_usage_of_a_stream(target: Target) -> None:
    chunks = list(chat(target, max_tokens=4, stream_usage=True).stream("Hi"))
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [4]


async def test_async_stream(target: Target) -> None:
    model = chat(target, temperature=0, max_tokens=6)
    text = "".join([chunk.content async for chunk in model.astream("Hi")])
    assert text == (await model.ainvoke("Hi")).content


def test_logprobs(target: Target) -> None:
    bound = chat(target, max_tokens=3).bind(logprobs=True, top_logprobs=2)
    entries = bound.invoke("Hi").response_metadata["logprobs"]["content"]
    assert len(entries) == 3 and all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_completions(target: Target) -> None:
    model = langchain_openai.OpenAI(
        model=target.model, base_url=target.v1, api_key="any", temperature=0, max_tokens=5
    )
    whole = model.invoke("The capital of France is")
    assert "Paris" in whole
    assert "".join(model.stream("The capital of France is")) == whole


class weather(BaseModel):  # noqa: N801, the name is the tool's
    """The weather of a city."""

    city: str = Field(description="where")


@pytest.mark.parametrize("stream", [False, True])
def test_bound_tools(scripted: Scripted, stream: bool) -> None:
    messages = langchain_openai.chat_models.base
    model = chat(scripted).bind_tools([weather])
    said: Any = [messages.HumanMessage('call weather {"city": "Zürich"}')]
    if stream:
        first, *rest = model.stream(said)
        answer = first
        for chunk in rest:
            answer += chunk
    else:
        answer = model.invoke(said)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Zürich"})
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    result = messages.ToolMessage("rain", tool_call_id=call["id"])
    assert model.invoke([*said, answer, result]).content == "The tool said: rain"


def test_refusals_keep_their_type(target: Target) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(target, temperature=-3).invoke("Hi")


class Place(BaseModel):
    """What kind of place it is."""

    kind: Literal["city", "river"]
    is_big: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(target: Target, method: str) -> None:
    model = chat(target, temperature=0, max_tokens=100)
    structured = model.with_structured_output(Place, method=method)
    assert isinstance(structured.invoke("Paris"), Place)


def test_responses(target: Target) -> None:
    model = chat(target, temperature=0, use_responses_api=True)
    answer = model.invoke("What is the capital of France?")
    assert "Paris" in answer.text
    streamed = "".join(chunk.text for chunk in model.stream("What is the capital of France?"))
    assert streamed == answer.text


def test_embeddings(target: Target) -> None:
    model = langchain_openai.OpenAIEmbeddings(
        model=target.model,
        base_url=target.v1,
        api_key="any",
        check_embedding_ctx_length=False,  # or it would look for a tokenizer of OpenAI's
    )
    first, second = model.embed_documents(["Hi", "Ho"])
    assert model.embed_query("Hi") == pytest.approx(first, abs=1e-5)
    assert len(first) == len(second) and first != second
