"""How well two texts fit, as a number: by a classifier that reads both, or by their embeddings.

The classifier (a cross-encoder, arXiv 1908.10084) gives its one label's score; embeddings are
compared by the cosine of their angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from fastapi import Request

from headrace.api.pooling import Encoded, PoolingRun, values
from headrace.engine.client import Task
from headrace.sampling_params import PoolingParams


class PairScorer:
    """Tokenizes pairs, before anything is submitted, and scores them. Used once."""

    def __init__(self, run: PoolingRun) -> None:
        self._run = run
        self._reads_both = Task.CLASSIFY in run.info.tasks
        self._pairs: list[tuple[int, int]] = []
        """Of places in _inputs; a cross-encoder's are the same."""
        self._inputs: list[Encoded] = []

    async def prepare(
        self,
        first: Sequence[str],
        second: Sequence[str],
        names: tuple[str, str],
        *,
        max_second: int | None = None,
    ) -> None:
        """`first` has one text, which goes with each of `second`, or as many. `names` of the two
        fields are for errors. Raises a RequestError for texts that cannot be scored."""
        run, count = self._run, len(second)
        if self._reads_both:
            lefts = first if len(first) > 1 else [first[0]] * count
            pairs = list(zip(lefts, second, strict=True))
            self._inputs = await run.encode_pairs(pairs, names[1], max_second=max_second)
            self._pairs = [(index, index) for index in range(count)]
            return
        left = await run.encode(first, names[0])
        right = await run.encode(second, names[1], most=max_second)
        self._inputs = [*left, *right]
        self._pairs = [
            (index if len(first) > 1 else 0, len(first) + index) for index in range(count)
        ]

    async def scores(self, request: Request) -> list[float]:
        """Of each pair. The engine's requests end if the client goes away."""
        run = self._run
        if self._reads_both:
            params = PoolingParams(task="classify", pooling=run.pooling.pooling)
            logits = await run.run(request, self._inputs, params)
            return [activated(values(vector), run.pooling.score_activation)[0] for vector in logits]
        params = PoolingParams(pooling=run.pooling.pooling, normalize=True)
        vectors = [values(vector) for vector in await run.run(request, self._inputs, params)]
        return [sum(map(mul, vectors[a], vectors[b])) for a, b in self._pairs]


def activated(logits: Sequence[float], activation: str) -> list[float]:
    """Scores of a classifier's labels."""
    if activation == "softmax":
        highest = max(logits)
        shares = [math.exp(logit - highest) for logit in logits]
        total = sum(shares)
        return [share / total for share in shares]
    if activation == "sigmoid":
        return [_sigmoid(logit) for logit in logits]
    return list(logits)


def _sigmoid(x: float) -> float:
    # Either way exp() gets what is not above 0, and cannot overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
