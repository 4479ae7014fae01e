"""/v1/score, /v1/rerank and /v1/moderations over an engine whose vectors are known."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest
from openai.types import ModerationCreateResponse
from tests.api.pooling_site import PoolingSite, pooling_site
from tests.api.test_embeddings import http, ids_of, vector_of

from headrace.api.moderations import CATEGORIES, category_of
from headrace.api.scoring import activated
from headrace.engine.client import Task

CROSS: dict[str, Any] = {"tasks": [Task.CLASSIFY, Task.SCORE], "labels": ["fits"]}
JUDGE: dict[str, Any] = {
    "tasks": [Task.CLASSIFY],
    "labels": ["hate", "V", "OK", "toxic", "insult"],
    "activation": "sigmoid",
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cosine(site: PoolingSite, a: str, b: str) -> float:
    left, right = vector_of(ids_of(site, a)), vector_of(ids_of(site, b))
    return sum(x * y for x, y in zip(left, right, strict=True))


async def post(site: PoolingSite, path: str, **body: Any) -> httpx.Response:
    async with http(site) as one:
        return await one.post(path, json=body)


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_one_text_against_several(path: str) -> None:
    site = pooling_site()
    answer = (await post(site, path, text_1="abc", text_2=["abc", "xyz"])).json()
    assert [entry["score"] for entry in answer["data"]] == [
        pytest.approx(1.0),
        pytest.approx(cosine(site, "abc", "xyz")),
    ]
    assert [(entry["index"], entry["object"]) for entry in answer["data"]] == [
        (0, "score"),
        (1, "score"),
    ]
    assert answer["object"] == "list" and answer["id"].startswith("score-")
    assert answer["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    assert len(site.engine.requests) == 3, "the one text is embedded once"


async def test_texts_in_pairs_and_under_other_names() -> None:
    site = pooling_site()
    answer = (await post(site, "/v1/score", queries=["a", "bb"], documents=["ab", "c"])).json()
    expected = [cosine(site, "a", "ab"), cosine(site, "bb", "c")]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected)


async def test_a_cross_encoder_reads_both() -> None:
    site = pooling_site(**CROSS)
    answer = (await post(site, "/v1/score", text_1="abc", text_2=["xbc", "xyz"])).json()
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx([sigmoid(2), sigmoid(0)])
    first = site.engine.requests[0]
    assert first.pooling is not None and first.pooling.second_text == 5
    assert first.prompt_token_ids == ids_of(site, "abc") + ids_of(site, "xbc")[1:]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
@pytest.mark.parametrize("kind", [{}, CROSS], ids=["embedder", "cross-encoder"])
async def test_documents_are_ranked(path: str, kind: dict[str, Any]) -> None:
    site = pooling_site(**kind)
    documents = ["xyz", {"text": "abc"}, "abz"]
    answer = (await post(site, path, query="abc", documents=documents)).json()
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    assert [result["document"]["text"] for result in answer["results"]] == ["abc", "abz", "xyz"]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["model"] == "tiny" and answer["id"].startswith("rerank-")
    assert answer["usage"]["prompt_tokens"] > 0


async def test_the_best_documents_without_their_texts() -> None:
    site = pooling_site()
    body = {"query": "ab", "documents": ["z", "ab", "ab"], "top_n": 2, "return_documents": False}
    answer = (await post(site, "/rerank", **body, rank_fields=["x"])).json()
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in answer["results"]] == [1, 2], "equals keep their order"
    assert answer["headrace"]["ignored_fields"] == ["rank_fields"]
    for top_n in (0, 9):
        whole = (await post(site, "/rerank", **{**body, "top_n": top_n})).json()
        assert len(whole["results"]) == 3


@pytest.mark.parametrize("kind", [{}, CROSS], ids=["embedder", "cross-encoder"])
async def test_documents_are_cut_to_what_was_asked(kind: dict[str, Any]) -> None:
    site = pooling_site(**kind)
    body = {"query": "abc", "documents": ["a" * 200], "max_tokens_per_doc": 6}
    assert (await post(site, "/v1/rerank", **body)).status_code == 200
    decode = site.engine.tokenizer.decode
    sent = decode(site.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    kept = "[SEP]aaaaaa[SEP]" if kind else "[CLS]aaaa[SEP]"
    assert sent.replace(" ", "").endswith(kept)


@pytest.mark.parametrize(
    ("query", "document", "lengths"),
    [
        ("a" * 100, "b" * 10, (51, 10)),
        ("a" * 10, "b" * 100, (10, 51)),
        ("a" * 99, "b" * 98, (31, 30)),
    ],
)
async def test_the_longer_of_two_texts_is_cut_first(
    query: str, document: str, lengths: tuple[int, int]
) -> None:
    site = pooling_site(**CROSS)
    body = {"query": query, "documents": [document], "truncate_prompt_tokens": -1}
    assert (await post(site, "/v1/rerank", **body)).status_code == 200
    [request] = site.engine.requests
    token_ids = request.prompt_token_ids
    a, b = ids_of(site, "a")[1], ids_of(site, "b")[1]
    assert (token_ids.count(a), token_ids.count(b)) == lengths
    assert len(token_ids) == 64 and request.pooling is not None
    assert request.pooling.second_text == lengths[0] + 2


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "as many"),
        ("/v1/score", {"text_1": "a"}, "text_2", "required"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "non-empty"),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 2049}, "text_2", "at most 2048"),
        ("/v1/score", {"text_1": "", "text_2": "a"}, "text_1", "empty string"),
        ("/v1/score", {"text_1": "a" * 63, "text_2": "a"}, "text_1", "65 tokens"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "non-empty"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents", "a text"),
        ("/v1/rerank", {"query": "a", "documents": ["a", ""]}, "documents[1]", "empty string"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "at least 0"),
        ("/v1/rerank", {"documents": ["a"]}, "query", "required"),
        ("/v1/rerank", {"query": "a", "documents": "a"}, "documents", "non-empty array"),
        ("/v1/moderations", {"input": "a"}, "model", "takes /v1/embeddings"),
    ],
)
async def test_what_cannot_be_done_is_named(
    path: str, body: dict[str, Any], param: str, words: str
) -> None:
    site = pooling_site()
    response = await post(site, path, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"], error
    assert error["param"] == param
    assert site.engine.requests == []


async def test_a_classifier_of_several_labels_ranks_nothing() -> None:
    site = pooling_site(**JUDGE)
    response = await post(site, "/v1/rerank", query="a", documents=["b"])
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "unsupported_task"
    assert "takes /v1/moderations" in error["message"]


async def test_moderation_in_openai_s_shape() -> None:
    site = pooling_site(**JUDGE)
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", http_client=http(site))
    answer = await client.moderations.create(input=["hhh", "OOO", "iiit"], model="tiny")
    ModerationCreateResponse.model_validate(answer.model_dump(), strict=True)
    hateful, fine, insulting = answer.results
    assert hateful.flagged and hateful.categories.hate
    assert hateful.category_scores.hate == pytest.approx(sigmoid(2))
    assert hateful.category_applied_input_types.hate == ["text"]
    assert hateful.category_applied_input_types.sexual == []
    assert hateful.category_scores.sexual == 0 and not hateful.categories.harassment
    assert not fine.flagged
    assert insulting.categories.harassment, "of two labels for one category the higher counts"
    assert insulting.category_scores.harassment == pytest.approx(sigmoid(2))
    assert answer.id.startswith("modr-") and answer.model == "tiny"
    with_aliases = hateful.model_dump(by_alias=True)
    assert set(CATEGORIES) == set(with_aliases["categories"])


async def test_parts_of_text_are_judged_one_by_one() -> None:
    site = pooling_site(**JUDGE)
    parts = [{"type": "text", "text": "hhh"}, {"type": "text", "text": "a"}]
    answer = (await post(site, "/v1/moderations", input=parts)).json()
    assert [result["flagged"] for result in answer["results"]] == [True, False]
    parts.append({"type": "image_url", "image_url": {"url": "data:"}})  # type: ignore[dict-item]
    response = await post(site, "/v1/moderations", input=parts)
    assert response.status_code == 400
    assert "'image_url'; only text is judged" in response.json()["error"]["message"]


async def test_labels_that_name_no_category_are_told() -> None:
    site = pooling_site(tasks=[Task.CLASSIFY], labels=["LABEL_0", "LABEL_1"])
    error = (await post(site, "/v1/moderations", input="a")).json()["error"]
    assert error["code"] == "unsupported_task" and "'LABEL_0', 'LABEL_1'" in error["message"]
    assert "id2label" in error["message"]


@pytest.mark.parametrize(
    ("label", "category"),
    [
        ("violence/graphic", "violence/graphic"),
        ("Self-Harm", "self-harm"),
        ("Hate Speech", "hate"),
        ("S3", "sexual/minors"),
        ("severe_toxic", "harassment"),
        ("OK", None),
        ("neutral", None),
    ],
)
def test_labels_stand_for_categories(label: str, category: str | None) -> None:
    assert category_of(label) == category


def test_scores_of_logits_that_are_far_from_zero() -> None:
    assert activated([1000.0, -1000.0], "softmax") == [1.0, 0.0]
    assert activated([1000.0, -1000.0], "sigmoid") == [1.0, 0.0]
    assert activated([2.0, -3.0], "none") == [2.0, -3.0]
    assert sum(activated([0.1, 0.2, -4.0], "softmax")) == pytest.approx(1)
