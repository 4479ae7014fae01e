"""openai-python 2, which most libraries still want."""

from __future__ import annotations

from typing import Any

import openai
import pytest

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_version() -> None:
    assert openai.__version__.startswith("2.")


def test_whole_and_streamed(target: Any) -> None:
    client = openai.OpenAI(base_url=target.v1, api_key="any", max_retries=0)
    arguments: Any = {"model": target.model, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    assert whole is not None and "Paris" in whole
    with client.chat.completions.stream(**arguments) as stream:
        assert stream.get_final_completion().choices[0].message.content == whole
    text = client.completions.create(
        model=target.model, prompt="The capital of France is", max_tokens=5, temperature=0
    )
    assert "Paris" in text.choices[0].text


def test_errors_and_retries(target: Any, scripted: Any) -> None:
    client = openai.OpenAI(base_url=target.v1, api_key="any", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=target.model, messages=QUESTION, temperature=-3)
    assert caught.value.param == "temperature"
    client = openai.OpenAI(base_url=scripted.v1, api_key="any", max_retries=1)
    busy: Any = [{"role": "user", "content": "busy openai2 say at last"}]
    answer = client.chat.completions.create(model=scripted.model, messages=busy)
    assert answer.choices[0].message.content == "at last"


def test_files(target: Any) -> None:
    client = openai.OpenAI(base_url=target.v1, api_key="any", max_retries=0)
    file = client.files.create(file=("two.jsonl", b"{}\n"), purpose="batch")
    assert client.files.content(file.id).read() == b"{}\n"
    assert client.files.delete(file.id).deleted
