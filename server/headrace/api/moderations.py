"""POST /v1/moderations: what is wrong with a text, in OpenAI's categories.

https://platform.openai.com/docs/api-reference/moderations. A ModerationClassifier judges; the one
that is here is a served text classifier whose labels name categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fastapi import APIRouter, Request, Response

from headrace.api.body import receive
from headrace.api.pooling import PoolingRun, extras, respond, values
from headrace.api.pooling_protocol import ModerationRequest
from headrace.api.scoring import activated
from headrace.api.services import services_of
from headrace.engine.client import Task
from headrace.errors import InvalidRequestError
from headrace.sampling_params import PoolingParams

router = APIRouter()

THRESHOLD = 0.5
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# Labels of classifiers in use, in lower case and with spaces as "_", for the categories' own names
# are known anyway. The short ones are those of OpenAI's data set of 2022 (arXiv 2208.03274).
_CATEGORY_OF = {
    "h": "hate",
    "h2": "hate/threatening",
    "hr": "harassment",
    "s": "sexual",
    "s3": "sexual/minors",
    "sh": "self-harm",
    "v": "violence",
    "v2": "violence/graphic",
    "toxic": "harassment",
    "toxicity": "harassment",
    "severe_toxic": "harassment",
    "severe_toxicity": "harassment",
    "insult": "harassment",
    "offensive": "harassment",
    "threat": "harassment/threatening",
    "identity_hate": "hate",
    "identity_attack": "hate",
    "hate_speech": "hate",
    "obscene": "sexual",
    "sexual_explicit": "sexual",
    "nsfw": "sexual",
    "self_harm": "self-harm",
    "suicide": "self-harm/intent",
}


class ModerationClassifier(Protocol):
    async def scores(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """Of each text, by category: 0 to 1. A category that it does not know is left out."""
        ...


class ServedClassifier:
    """A ModerationClassifier: the labels of a sequence classification checkpoint."""

    def __init__(self, request: Request, run: PoolingRun) -> None:
        """Raises InvalidRequestError for a model of which no label is a category."""
        self._request, self._run = request, run
        labels = run.pooling.labels
        self._categories = [category_of(label) for label in labels]
        if not any(self._categories):
            shown = ", ".join(repr(label) for label in labels[:8])
            raise InvalidRequestError(
                f"The model {run.model.name!r} judges nothing that moderation asks for: its labels "
                f"are {shown}. Serve one whose id2label names categories, such as 'hate' or "
                "'violence/graphic'.",
                param="model",
                code="unsupported_task",
            )

    async def scores(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        with self._run.services.counting_rejections():
            inputs = await self._run.encode(texts, "input")
        params = PoolingParams(task="classify", pooling=self._run.pooling.pooling)
        logits = await self._run.run(self._request, inputs, params)
        return [self._by_category(values(vector)) for vector in logits]

    def _by_category(self, logits: Sequence[float]) -> Mapping[str, float]:
        """Of several labels for one category the highest score."""
        found: dict[str, float] = {}
        scores = activated(logits, self._run.pooling.score_activation)
        for category, score in zip(self._categories, scores, strict=True):
            if category is not None:
                found[category] = max(score, found.get(category, 0.0))
        return found


@router.post("/v1/moderations")
async def create_moderation(request: Request) -> Response:
    """What is wrong with each text."""
    services = services_of(request)
    with services.counting_rejections():
        services.check_admission()
        body, ignored = await receive(request, ModerationRequest)
        run = PoolingRun.of(request, body, Task.CLASSIFY, "modr")
        classifier: ModerationClassifier = ServedClassifier(request, run)
    results = [_result(scores) for scores in await classifier.scores(body.input)]

    def shape() -> dict[str, object]:
        return {
            "id": run.response_id,
            "model": body.model or run.model.name,
            "results": results,
            **extras(ignored),
        }

    return await respond(shape, len(results) * len(CATEGORIES))


def category_of(label: str) -> str | None:
    """OpenAI's category that a classifier's label stands for, if it does for one."""
    name = label.strip().lower()
    if name in CATEGORIES:
        return name
    return _CATEGORY_OF.get(name.replace(" ", "_").replace("-", "_"))


def _result(scores: Mapping[str, float]) -> dict[str, object]:
    """All categories are there, those that the classifier does not know with 0."""
    categories = {name: scores.get(name, 0.0) >= THRESHOLD for name in CATEGORIES}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": {name: scores.get(name, 0.0) for name in CATEGORIES},
        "category_applied_input_types": {
            name: ["text"] if name in scores else [] for name in CATEGORIES
        },
    }
