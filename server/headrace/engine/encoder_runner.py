"""Runs batches of whole requests through an encoder: one forward pass, then pooling or labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import FloatArray
from headrace.engine.pooling import pooled
from headrace.layers.matrix import Matrix
from headrace.models.encoders import EncoderModel
from headrace.sampling_params import GenerateRequest, PoolingParams


class EncoderRunner:
    """Not thread-safe; one batch at a time."""

    def __init__(self, model: EncoderModel) -> None:
        self._model = model
        self._device = model.context.device
        self._pad_to = max(
            part.row_multiple for part in model.modules() if isinstance(part, Matrix)
        )

    @torch.inference_mode()
    def run(self, requests: Sequence[GenerateRequest]) -> list[FloatArray]:
        """The vector of each request, [E], or its logits, [L]. Its bits depend on it alone."""
        lengths = [len(request.prompt_token_ids) for request in requests]
        starts = [0, *np.cumsum(lengths).tolist()]
        hidden = self._forward(requests, lengths, starts)
        vectors: list[FloatArray] = []
        judged: list[FloatArray] = []
        for index, request in enumerate(requests):
            params = _params(request)
            own = hidden[starts[index] : starts[index + 1]]
            if params.task == "classify":
                judged.append(pooled(own, params))
            else:
                vectors.append(pooled(own, params))
        if not judged:
            return vectors
        hidden = torch.from_numpy(np.stack(judged)).to(self._device)
        logits = iter(self._model.classify(hidden).cpu().numpy())
        embeddings = iter(vectors)
        return [
            next(logits if _params(request).task == "classify" else embeddings)
            for request in requests
        ]

    def _forward(
        self, requests: Sequence[GenerateRequest], lengths: list[int], starts: list[int]
    ) -> Tensor:
        padded = -(-starts[-1] // self._pad_to) * self._pad_to
        token_ids, positions, types = np.zeros((3, padded), np.int64)
        for request, begin, length in zip(requests, starts, lengths, strict=False):
            token_ids[begin : begin + length] = request.prompt_token_ids
            positions[begin : begin + length] = np.arange(length)
            second = _params(request).second_text
            # A tokenizer may tell two texts apart where its model does not.
            if second is not None and self._model.config.num_token_types > 1:
                types[begin + second : begin + length] = 1
        inputs = (
            torch.from_numpy(array).to(self._device) for array in (token_ids, positions, types)
        )
        hidden: Tensor = self._model(*inputs, starts)
        return hidden


def _params(request: GenerateRequest) -> PoolingParams:
    assert request.pooling is not None, "the client sends an encoder nothing else"
    return request.pooling
