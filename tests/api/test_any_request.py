"""Any request to any route is answered, never with a 5xx of ours, and none is logged as a bug."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tests.api.conftest import http_client, keep
from tests.api.pooling_site import pooling_site

from headrace.api.batches import BatchRequest
from headrace.api.messages_protocol import CountTokensRequest, MessagesRequest
from headrace.api.pooling_protocol import (
    EmbeddingRequest,
    ModerationRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.api.protocol import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from headrace.api.responses_protocol import ResponsesRequest
from headrace.engine.client import Task

ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/batches": BatchRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/apply-template": ApplyTemplateRequest,
}
POOLING: dict[str, type[BaseModel]] = {
    "/v1/embeddings": EmbeddingRequest,
    "/v1/rerank": RerankRequest,
    "/v1/score": ScoreRequest,
    "/v1/moderations": ModerationRequest,
}
SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.integers(-3, 130)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "\0", "", "auto", "function", "json_schema", "required"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.just([{"role": "user", "content": "Hi"}]),
    "prompt": st.sampled_from(["Hi", [65, 66], ["a", "b"], [[65], [66]]]),
    "input": st.sampled_from(["Hi", [{"role": "user", "content": "Hi"}]]),
    "max_tokens": st.just(3),
    "max_output_tokens": st.just(3),
    "tokens": st.just([65, 66]),
    "query": st.just("a"),
    "documents": st.just(["a", "b"]),
    "text_1": st.just("a"),
    "text_2": st.just(["a", "b"]),
    "model": st.none(),
}


def bodies(kind: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Mostly good ones, with up to two fields of the kind that may be anything."""
    names = sorted(kind.model_fields)
    good = {name: GOOD[name] for name in names if name in GOOD}
    wrong = st.dictionaries(st.sampled_from([*names, "unknown"]), VALUES, max_size=2)
    return st.builds(lambda fine, more: {**fine, **more}, st.fixed_dictionaries(good), wrong)


@pytest.fixture
def bugs() -> Iterator[list[str]]:
    """What is logged as an error."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Handler(logging.ERROR)
    logging.getLogger().addHandler(handler)
    yield seen
    logging.getLogger().removeHandler(handler)


async def send(client: Any, url: str, body: Any, bugs: list[str]) -> None:
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    async with asyncio.timeout(20):
        response = await client.post(url, content=content, headers=headers)
    assert response.status_code < 500, (url, body, response.text[:500])
    assert not bugs, (url, body, bugs)
    if response.status_code >= 400:
        message = response.json()["error"]["message"]
        assert 0 < len(message) < 5000 and "Traceback" not in message and "/site-" not in message


@given(data=st.data())
@settings(deadline=None, max_examples=12, derandomize=True)
def draw_all(routes: dict[str, type[BaseModel]], made: list[Any], data: st.DataObject) -> None:
    made.extend((url, data.draw(bodies(kind))) for url, kind in routes.items())


async def test_any_body_to_any_route(tmp_path: Path, bugs: list[str]) -> None:
    made: list[Any] = []
    draw_all(ROUTES, made)
    async with keep(tmp_path, work=False) as kept:
        for url, body in made:
            await send(kept.http, url, body, bugs)
        await kept.site.settle()


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"tasks": [Task.CLASSIFY], "labels": ["a", "b"]},
        {"tasks": [Task.SCORE], "labels": ["a"]},
    ],
    ids=["embeds", "classifies", "scores"],
)
async def test_any_body_to_routes_that_pool(engine: dict[str, Any], bugs: list[str]) -> None:
    made: list[Any] = []
    draw_all(POOLING, made)
    site = pooling_site(**engine)
    async with http_client(site) as client:  # type: ignore[arg-type]
        for url, body in made:
            await send(client, url, body, bugs)
