"""A real encoder behind the real server, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from tests.e2e.conftest import _kept_whole

if TYPE_CHECKING:
    from tests.e2e.conftest import RunCommand, Server

pytestmark = pytest.mark.e2e

MODEL = "minilm"
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods. " * 12,
]


@pytest.fixture(scope="module")
def encoder(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [minilm_path, "--threads", "1", "--served-model-name", MODEL]
    yield from _kept_whole(tmp_path_factory.mktemp("encoder"), arguments)


@pytest.fixture
def client(encoder: Server) -> openai.OpenAI:
    return encoder.client()


def vectors(answer: CreateEmbeddingResponse) -> np.ndarray:
    return np.array([entry.embedding for entry in answer.data])


def test_embeddings_are_those_of_transformers(client: openai.OpenAI, minilm_path: Path) -> None:
    import torch
    import transformers

    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    CreateEmbeddingResponse.model_validate(answer.model_dump(), strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    for text, vector in zip(TEXTS, vectors(answer), strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        assert np.abs((mean / mean.norm()).numpy() - vector).max() < 1e-5
    alone = client.embeddings.create(model=MODEL, input=TEXTS[1])
    assert np.array_equal(vectors(alone)[0], vectors(answer)[1]), "company changed the bits"
    similarity = vectors(answer) @ vectors(answer).T
    assert similarity[0, 1] > 0.7 > 0.3 > similarity[0, 2]


def test_numbers_are_the_same_in_either_encoding(client: openai.OpenAI) -> None:
    plain = client.embeddings.create(model=MODEL, input=TEXTS[:2], encoding_format="float")
    coded = client.embeddings.create(model=MODEL, input=TEXTS[:2])
    assert np.array_equal(vectors(plain), vectors(coded))
    assert plain.usage == coded.usage and plain.usage.prompt_tokens > 10


def test_many_inputs_at_once(encoder: Server, client: openai.OpenAI) -> None:
    before = encoder.wait_idle()
    texts = [f"Number {number}" for number in range(300)]
    answer = client.embeddings.create(model=MODEL, input=texts)
    assert len({tuple(vector) for vector in vectors(answer)}) == 300
    assert np.abs(np.linalg.norm(vectors(answer), axis=1) - 1).max() < 1e-6
    after = encoder.wait_idle()
    assert encoder.finished(after) - encoder.finished(before) == 300
    tokens = "headrace_prompt_tokens_total"
    assert after[tokens] - before[tokens] == answer.usage.prompt_tokens


def test_long_texts_are_refused_or_cut(client: openai.OpenAI) -> None:
    long = "word " * 400
    with pytest.raises(openai.BadRequestError, match="has 402 tokens, and this model takes 256"):
        client.embeddings.create(model=MODEL, input=long)
    cut = client.embeddings.create(
        model=MODEL, input=long, extra_body={"truncate_prompt_tokens": -1}
    )
    assert cut.usage.prompt_tokens == 256
    with pytest.raises(openai.BadRequestError, match="Matryoshka"):
        client.embeddings.create(model=MODEL, input="a", dimensions=64)


def test_the_document_that_answers_comes_first(encoder: Server) -> None:
    documents = ["Bread is made of flour.", "Paris is the capital of France.", "It rains."]
    body: dict[str, Any] = {"query": "What is the capital of France?", "documents": documents}
    results = encoder.post("/v1/rerank", body).json()["results"]
    assert results[0]["index"] == 1 and results[0]["relevance_score"] > 0.7
    score = encoder.post("/v1/score", {"text_1": body["query"], "text_2": documents}).json()
    by_index = {result["index"]: result["relevance_score"] for result in results}
    assert [entry["score"] for entry in score["data"]] == [by_index[i] for i in range(3)]


def test_it_does_not_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="it takes /v1/embeddings") as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    assert caught.value.code == "unsupported_task"
    with pytest.raises(openai.BadRequestError, match="a text classifier"):
        client.moderations.create(model=MODEL, input="Hello")


def test_the_plan_of_an_encoder(run_command: RunCommand, minilm_path: Path) -> None:
    done = run_command("plan", minilm_path)
    assert done.returncode == 0, done.stderr
    assert "BertModel" in done.stdout and "an encoder has no KV cache" in done.stdout
    assert "22,565,376" in done.stdout and "mean" in done.stdout
