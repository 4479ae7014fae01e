"""POST /v1/rerank: documents by how well they answer a query, in the shape of Jina and Cohere.

https://jina.ai/reranker, https://docs.cohere.com/reference/rerank; as vLLM has it at three paths.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from headrace.api.body import receive
from headrace.api.pooling import PoolingRun, extras, respond
from headrace.api.pooling_protocol import RerankRequest
from headrace.api.scoring import PairScorer
from headrace.api.services import services_of
from headrace.engine.client import Task
from headrace.errors import InvalidRequestError

router = APIRouter()


@router.post("/v1/rerank")
@router.post("/v2/rerank")
@router.post("/rerank")
async def rerank(request: Request) -> Response:
    """Documents in the order of how well they fit a query."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, RerankRequest)
        if body.top_n is not None and body.top_n < 0:
            raise InvalidRequestError(
                f"top_n must be at least 0, got {body.top_n}; 0 means all.", param="top_n"
            )
        run = PoolingRun.of(request, body, Task.SCORE, "rerank")
        scorer = PairScorer(run)
        await scorer.prepare(
            [body.query],
            body.documents,
            ("query", "documents"),
            max_second=body.max_tokens_per_doc,
        )
    scores = await scorer.scores(request)
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    best = best[: body.top_n or None]

    def shape() -> dict[str, object]:
        results: list[dict[str, object]] = [
            {"index": index, "relevance_score": scores[index]} for index in best
        ]
        if body.return_documents:
            for result, index in zip(results, best, strict=True):
                result["document"] = {"text": body.documents[index]}
        return {
            "id": run.response_id,
            "model": body.model or run.model.name,
            "results": results,
            "usage": run.usage,
            **extras(ignored),
        }

    return await respond(shape, len(scores))
