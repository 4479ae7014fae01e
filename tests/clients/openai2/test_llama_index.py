"""llama-index, through its OpenAILike model."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai_like import OpenAILike

PROMPT = "The capital of France is"


def like(target: Any, **more: Any) -> OpenAILike:
    arguments: Any = {"is_chat_model": True, "max_retries": 0, "context_window": 2048, **more}
    return OpenAILike(model=target.model, api_base=target.v1, api_key="any", **arguments)


def test_chat_and_stream(target: Any) -> None:
    model = like(target, temperature=0)
    said = [ChatMessage(role=MessageRole.USER, content="What is the capital of France?")]
    whole = model.chat(said).message.content
    assert whole is not None and "Paris" in whole
    streamed = "".join(part.delta or "" for part in model.stream_chat(said))
    assert streamed == whole


async def test_async_complete(target: Any) -> None:
    model = like(target, temperature=0, is_chat_model=False, max_tokens=6)
    whole = (await model.acomplete("The capital of France is")).text
    assert "Paris" in whole
    parts = [
        part.delta or "" async for part in await model.astream_complete("The capital of France is")
    ]
    assert "".join(parts) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_tools(scripted: Any, stream: bool) -> None:
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    tool = FunctionTool.from_defaults(weather)
    model = like(scripted, is_function_calling_model=True)
    said = 'call weather {"city": "Zürich"}'
    if stream:
        *_, answer = model.stream_chat_with_tools([tool], user_msg=said)
    else:
        answer = model.chat_with_tools([tool], user_msg=said)
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Zürich"})
    result = model.predict_and_call([tool], user_msg=said)
    assert str(result) == "rain in Zürich"


def test_embeddings(target: Any) -> None:
    model = OpenAIEmbedding(
        model_name=target.model, api_base=target.v1, api_key="any", max_retries=0
    )
    first, second = model.get_text_embedding_batch(["Hi", "Ho"])
    assert len(first) == len(second) and first != second
