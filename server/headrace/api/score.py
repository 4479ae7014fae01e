"""POST /v1/score: how well texts fit each other, in vLLM's shape."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from headrace.api.body import receive
from headrace.api.pooling import PoolingRun, extras, respond
from headrace.api.pooling_protocol import ScoreRequest
from headrace.api.scoring import PairScorer
from headrace.api.services import services_of
from headrace.engine.client import Task
from headrace.errors import InvalidRequestError

router = APIRouter()


@router.post("/v1/score")
@router.post("/score")
async def create_score(request: Request) -> Response:
    """How well each of text_2 fits text_1."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, ScoreRequest)
        run = PoolingRun.of(request, body, Task.SCORE, "score")
        first, second = body.text_1, body.text_2
        if len(first) not in (1, len(second)):
            raise InvalidRequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give as many of each, or "
                "one text_1.",
                param="text_1",
            )
        scorer = PairScorer(run)
        await scorer.prepare(first, second, ("text_1", "text_2"))
    scores = await scorer.scores(request)

    def shape() -> dict[str, object]:
        return {
            "id": run.response_id,
            "object": "list",
            "created": int(time.time()),
            "model": body.model or run.model.name,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores)
            ],
            "usage": run.usage,
            **extras(ignored),
        }

    return await respond(shape, len(scores))
