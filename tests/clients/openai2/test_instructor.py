"""instructor: answers as Pydantic models, by schema and by a forced call."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
import pytest
from pydantic import BaseModel


class Place(BaseModel):
    """A place."""

    kind: Literal["city", "river", "mountain"]
    is_big: bool


ASK: Any = [{"role": "user", "content": "Paris is what kind of place?"}]


def client_of(target: Any, mode: instructor.Mode) -> instructor.Instructor:
    plain = openai.OpenAI(base_url=target.v1, api_key="any", max_retries=0)
    return instructor.from_openai(plain, mode=mode)


@pytest.mark.parametrize(
    "mode",
    [
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
    ],
)
def test_a_model_comes_back(target: Any, mode: instructor.Mode) -> None:
    place = client_of(target, mode).chat.completions.create(
        model=target.model,
        messages=ASK,
        response_model=Place,
        temperature=0,
        max_tokens=100,
        max_retries=0,
    )
    assert isinstance(place, Place)


def test_partial_models_stream(target: Any) -> None:
    client = client_of(target, instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.chat.completions.create_partial(
            model=target.model, messages=ASK, response_model=Place, temperature=0, max_tokens=100
        )
    )
    assert parts[-1].kind in ("city", "river", "mountain") and parts[-1].is_big is not None


async def test_async(target: Any) -> None:
    plain = openai.AsyncOpenAI(base_url=target.v1, api_key="any", max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    place = await client.chat.completions.create(
        model=target.model, messages=ASK, response_model=Place, temperature=0, max_tokens=100
    )
    assert isinstance(place, Place)
