"""POST /v1/embeddings: a vector of each input, by encoders and language models alike.

https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request, Response

from headrace.api.body import receive
from headrace.api.pooling import Encoded, PoolingRun, extras, respond, values
from headrace.api.pooling_protocol import EmbeddingRequest
from headrace.api.services import services_of
from headrace.engine.client import Task
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.sampling_params import PoolingParams

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request) -> Response:
    """A vector of each input."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, EmbeddingRequest)
        run = PoolingRun.of(request, body, Task.EMBED, "embd")
        params = _params(run, body)
        inputs = await _encode(run, body)
    vectors = await run.run(request, inputs, params)

    def shape() -> dict[str, object]:
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _form(vector, body.encoding_format),
                }
                for index, vector in enumerate(vectors)
            ],
            "model": body.model or run.model.name,
            "usage": run.usage,
            **extras(ignored),
        }

    return await respond(shape, sum(map(len, vectors)) // 4)


def _form(vector: bytes, encoding_format: str | None) -> str | tuple[float, ...]:
    """base64 of little-endian float32, as OpenAI's clients decode it, or numbers."""
    return base64.b64encode(vector).decode() if encoding_format == "base64" else values(vector)


def _params(run: PoolingRun, body: EmbeddingRequest) -> PoolingParams:
    pooling = run.pooling
    if body.dimensions is not None:
        _check_dimensions(run, body.dimensions)
    return PoolingParams(
        pooling=pooling.pooling,
        normalize=pooling.normalize if body.normalize is None else body.normalize,
        dimensions=body.dimensions,
    )


def _check_dimensions(run: PoolingRun, dimensions: int) -> None:
    """As vLLM and SGLang: a part of a vector is one only where the model was trained for that."""
    full = run.pooling.dimensions
    if not 1 <= dimensions <= full:
        raise InvalidRequestError(
            f"dimensions must be in [1, {full}] for this model, got {dimensions}.",
            param="dimensions",
        )
    if dimensions != full and not run.pooling.matryoshka:
        raise UnsupportedParameterError(
            f"dimensions can only be {full}: the model {run.model.name!r} does not say that it was "
            "trained for fewer (Matryoshka). If it was, set is_matryoshka to true in its "
            "config.json.",
            param="dimensions",
        )


async def _encode(run: PoolingRun, body: EmbeddingRequest) -> list[Encoded]:
    given = body.input
    if isinstance(given, str):
        given = [given]
    texts = [text for text in given if isinstance(text, str)]
    if texts:
        return await run.encode(texts, "input", add_special_tokens=body.add_special_tokens)
    batches = [ids for ids in given if isinstance(ids, list)]
    inputs = batches or [[token for token in given if isinstance(token, int)]]
    kept: list[Encoded] = []
    for index, token_ids in enumerate(inputs):
        at = f"input[{index}]" if batches else "input"
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= run.info.vocab_size):
            raise InvalidRequestError(
                f"{at} holds token ids outside 0 to {run.info.vocab_size - 1}, the vocabulary of "
                "this model. Send text, or ids of its own tokenizer (LangChain's OpenAIEmbeddings: "
                "check_embedding_ctx_length=False).",
                param=at,
            )
        if run.truncates:
            token_ids = token_ids[-run.limit :] if run.keeps_end else token_ids[: run.limit]
        kept.append(Encoded(token_ids))
    return run.checked(kept, "input")
