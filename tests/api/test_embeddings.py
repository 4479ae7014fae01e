"""/v1/embeddings over an engine whose vectors are known."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import httpx
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from tests.api.pooling_site import CLS, LENGTH, SEP, SIZE, PoolingSite, pair_tokenizer, pooling_site

from headrace.engine.client import QueueLimits, Task
from headrace.errors import OverloadedError
from headrace.sampling_params import BACKGROUND_PRIORITY

PATH = "/v1/embeddings"


def http(site: PoolingSite) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(site.app), base_url="http://test")


def client(site: PoolingSite) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="any", http_client=http(site), max_retries=0
    )


def vector_of(token_ids: list[int], dimensions: int = SIZE) -> list[float]:
    counts = [sum(t % SIZE == place for t in token_ids) for place in range(SIZE)][:dimensions]
    length = sum(count * count for count in counts) ** 0.5
    return [count / length for count in counts]


def ids_of(site: PoolingSite, text: str) -> list[int]:
    return site.engine.tokenizer.encode(text)


async def post(site: PoolingSite, **body: Any) -> Any:
    async with http(site) as one:
        return await one.post(PATH, json=body)


async def refusal(site: PoolingSite, **body: Any) -> dict[str, Any]:
    response = await post(site, **{"input": "a", **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert site.engine.requests == [], "it reached the engine"
    return error


async def test_openai_s_client_decodes_base64_by_itself() -> None:
    site = pooling_site()
    answer = await client(site).embeddings.create(model="tiny", input=["Hello", "there"])
    CreateEmbeddingResponse.model_validate(answer.model_dump(), strict=True)
    for entry, text in zip(answer.data, ("Hello", "there"), strict=True):
        assert entry.embedding == pytest.approx(vector_of(ids_of(site, text)))
    assert [entry.index for entry in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (14, 14)
    assert answer.model == "tiny"


async def test_both_encodings_hold_the_same_numbers() -> None:
    site = pooling_site()
    plain = (await post(site, input="Hello")).json()
    coded = (await post(site, input="Hello", encoding_format="base64")).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{SIZE}f", raw)) == plain["data"][0]["embedding"]
    assert plain["object"] == "list" and plain["data"][0]["object"] == "embedding"
    assert "headrace" not in plain


A, B = (pair_tokenizer().encode(letter)[1] for letter in "ab")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [[CLS, A, B, SEP]]),
        (["ab", "b"], [[CLS, A, B, SEP], [CLS, B, SEP]]),
        ([66, 67], [[66, 67]]),
        ([[66], [67, 68]], [[66], [67, 68]]),
    ],
)
async def test_every_kind_of_input(given: Any, expected: list[list[int]]) -> None:
    site = pooling_site()
    answer = (await post(site, input=given)).json()
    assert [request.prompt_token_ids for request in site.engine.requests] == expected
    assert [entry["embedding"] for entry in answer["data"]] == [
        pytest.approx(vector_of(ids)) for ids in expected
    ]


async def test_without_special_tokens() -> None:
    site = pooling_site()
    await post(site, input="ab", add_special_tokens=False)
    assert site.engine.requests[0].prompt_token_ids == ids_of(site, "ab")[1:-1]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", "empty string"),
        ({"input": ["a", ""]}, "input[1]", "empty string"),
        ({"input": []}, "input", "non-empty array"),
        ({"input": [[]]}, "input", "no tokens"),
        ({"input": [[1], []]}, "input[1]", "no tokens"),
        ({"input": None}, "input", "must be a string"),
        ({"input": {"a": 1}}, "input", "must be a string"),
        ({"input": ["a", 1]}, "input", "must be a string"),
        ({"input": [1.5]}, "input", "must be a string"),
        ({"input": [True]}, "input", "must be a string"),
        ({"input": [258]}, "input", "outside 0 to 257"),
        ({"input": [[1], [-1]]}, "input[1]", "outside 0 to 257"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 items"),
        ({"input": "a" * 63}, "input", "has 65 tokens, and this model takes 64"),
        ({"input": ["a", "b" * 200_000]}, "input[1]", "has 200000 characters"),
        ({"input": [1] * 65}, "input", "has 65 tokens"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"dimensions": 0}, "dimensions", "must be in [1, 8]"),
        ({"dimensions": 9}, "dimensions", "must be in [1, 8]"),
        ({"dimensions": 4}, "dimensions", "Matryoshka"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"truncation_side": "left"}, "truncation_side", "needs truncate_prompt_tokens"),
        ({"priority": 2**31}, "priority", "less than"),
        ({"normalize": "yes"}, "normalize", "valid boolean"),
        ({"nonsense": 1, "strict_fields": True}, "nonsense", "Unknown field"),
    ],
)
async def test_what_cannot_be_done_is_named(body: dict[str, Any], param: str, words: str) -> None:
    site = pooling_site()
    error = await refusal(site, **body)
    assert error["param"] == param and words in error["message"], error
    assert (
        sum(
            sample.value
            for family in site.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "headrace_requests_rejected_total"
        )
        == 1
    )


async def test_too_long_is_its_own_code() -> None:
    assert (await refusal(pooling_site(), input="a" * 63))["code"] == "context_length_exceeded"


async def test_the_longest_input_fits() -> None:
    site = pooling_site()
    assert (await post(site, input="a" * (LENGTH - 2))).status_code == 200
    assert len(site.engine.requests[0].prompt_token_ids) == LENGTH


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({"truncate_prompt_tokens": 5}, "[CLS]abc[SEP]"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, "[CLS]abc[SEP]"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, "[CLS]def[SEP]"),
        ({"truncate_prompt_tokens": 5, "add_special_tokens": False}, "abcde"),
        ({"truncate_prompt_tokens": 50}, "[CLS]abcdef[SEP]"),
        ({"truncate_prompt_tokens": 2}, "[CLS][SEP]"),
        ({"truncate_prompt_tokens": 1}, "[CLS]"),
        ({"truncate_prompt_tokens": 0}, "[CLS]abcdef[SEP]"),
    ],
)
async def test_truncation_leaves_special_tokens(body: dict[str, Any], kept: str) -> None:
    site = pooling_site()
    assert (await post(site, input="abcdef", **body)).status_code == 200
    decode = site.engine.tokenizer.decode
    sent = decode(site.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert sent.replace(" ", "") == kept


async def test_truncation_to_what_the_model_takes() -> None:
    site = pooling_site()
    long = ["a" * 500_000, "b" * 100]
    assert (await post(site, input=long, truncate_prompt_tokens=-1)).status_code == 200
    assert (await post(site, input=[1] * 99, truncate_prompt_tokens=-1)).status_code == 200
    assert {len(request.prompt_token_ids) for request in site.engine.requests} == {LENGTH}


async def test_dimensions_of_a_model_that_was_trained_for_it() -> None:
    site = pooling_site(matryoshka=True)
    [entry] = (await post(site, input="Hello", dimensions=3)).json()["data"]
    assert entry["embedding"] == pytest.approx(vector_of(ids_of(site, "Hello"), 3))
    whole = (await post(pooling_site(), input="Hello", dimensions=SIZE)).json()["data"][0]
    assert len(whole["embedding"]) == SIZE


async def test_fields_reach_the_engine_or_are_named() -> None:
    site = pooling_site()
    answer = (
        await post(site, input="a", user="me", priority=3, normalize=False, task="retrieval")
    ).json()
    [request] = site.engine.requests
    assert request.priority == 3 and request.pooling is not None
    assert (request.pooling.pooling, request.pooling.normalize) == ("mean", False)
    assert answer["headrace"] == {"ignored_fields": ["task"]}


async def test_many_inputs_share_the_queue() -> None:
    """More than the queue holds: they go in as others leave."""
    site = pooling_site(limits=QueueLimits(6, 100_000))
    answer = (await post(site, input=[f"text {i}" for i in range(300)])).json()
    assert [entry["index"] for entry in answer["data"]] == list(range(300))
    for index in (0, 123, 299):
        expected = vector_of(ids_of(site, f"text {index}"))
        assert answer["data"][index]["embedding"] == pytest.approx(expected)
    assert site.engine.most_in_flight <= 6
    assert site.metric("requests_finished_total", model_name="tiny", finished_reason="stop") == 300
    tokens = sum(len(request.prompt_token_ids) for request in site.engine.requests)
    assert site.metric("prompt_tokens_total", model_name="tiny") == tokens
    assert answer["usage"]["prompt_tokens"] == tokens
    assert site.metric("request_decode_time_seconds_count", model_name="tiny") == 0
    assert site.metric("e2e_request_latency_seconds_count", model_name="tiny") == 300


async def test_a_full_queue_is_429() -> None:
    site = pooling_site(refuse=OverloadedError("Full.", retry_after=3))
    response = await post(site, input=["a", "b"])
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert site.metric("requests_rejected_total", model_name="tiny", reason="queue_full") == 1
    assert len(site.app.state.services.ledger) == 0


async def test_an_engine_that_fails_fails_the_request_only() -> None:
    site = pooling_site(fail="It broke.")
    response = await post(site, input=["a", "b"])
    assert response.status_code == 500 and response.json()["error"]["message"] == "It broke."
    site.engine.fail = None
    assert (await post(site, input="a")).status_code == 200


async def test_a_client_that_leaves_takes_its_requests_along() -> None:
    site = pooling_site(hold=True)
    body = b'{"input": ["a", "b", "c"]}'
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if sent:
            return sent.pop()
        while len(site.engine.requests) < 3:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    async with asyncio.timeout(5):
        await site.app(scope, receive, send)
    assert len(site.engine.aborted) == 3 and len(site.engine.live) == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_encoder_says_that_it_does_not_chat(path: str) -> None:
    site = pooling_site()
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": [MESSAGE]}
    async with http(site) as one:
        response = await one.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_task",
        "model",
    )
    assert "takes /v1/embeddings, /v1/score and /v1/rerank" in error["message"]


MESSAGE = {"role": "user", "content": "Hi"}


async def test_a_model_that_only_generates_makes_no_vectors(http: httpx.AsyncClient) -> None:
    response = await http.post(PATH, json={"input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_task"


async def test_the_list_of_models_tells_their_tasks() -> None:
    site = pooling_site()
    async with http(site) as one:
        [card] = (await one.get("/v1/models")).json()["data"]
        whole = (await one.get("/v1/models/tiny")).json()
    assert card["tasks"] == [Task.EMBED, Task.SCORE]
    assert whole["engine"]["pooling"]["dimensions"] == SIZE


async def test_batches_take_embeddings(keeping: Any, tmp_path: Any) -> None:
    async with keeping(tmp_path / "data") as kept:
        embedder = pooling_site(name="org/tiny")
        model = next(iter(embedder.app.state.services.models))
        kept.site.services.models.add(model)
        embedder.engine.on_record = kept.site.services.ledger.close
        line = {"custom_id": "a", "method": "POST", "url": PATH, "body": {"input": "Hello"}}
        bad = {**line, "custom_id": "b", "body": {"input": ""}}
        batch = await kept.run(line, bad, endpoint=PATH)
        [row] = await kept.rows(batch.output_file_id)
        [error] = await kept.rows(batch.error_file_id)
    assert batch.status == "completed" and batch.usage.input_tokens == 7
    expected = vector_of(ids_of(embedder, "Hello"))
    assert row["response"]["body"]["data"][0]["embedding"] == pytest.approx(expected)
    assert "empty string" in str(error)
    assert embedder.engine.requests[0].priority == BACKGROUND_PRIORITY
