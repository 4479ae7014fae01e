"""Vectors by the runner of a GPU, on a fake one: the bits of the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine.test_cuda_runner import cpu_engine, cuda_engine, requests

from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, PoolingParams, SamplingParams


def run(engine: Engine) -> dict[str, bytes | None]:
    rng = np.random.default_rng(5)
    kinds = ("last", "mean", "cls")
    pooled = [
        GenerateRequest(
            request_id=f"pooled-{index}",
            prompt_token_ids=rng.integers(1, 160, int(rng.integers(1, 90))).tolist(),
            sampling=SamplingParams(seed=index),
            pooling=PoolingParams(pooling=kinds[index % 3]),  # type: ignore[arg-type]
        )
        for index in range(9)
    ]
    for handle, request in enumerate([*requests(6), *pooled]):
        engine.add(request, handle)
    vectors: dict[str, bytes | None] = {}
    while engine.has_work:
        for output in engine.step().details:
            if output.finish_reason is not None:
                vectors[output.request_id] = output.vector
        engine.check_invariants()
    assert len(vectors) == 15
    assert all(vectors[str(index)] is None for index in range(6))
    return vectors


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("budget", [16, 256])
def test_the_bits_of_the_cpu_runner(checkpoint: Path, graphs: bool, budget: int) -> None:
    expected = run(cpu_engine(checkpoint))
    assert run(cuda_engine(checkpoint, graphs=graphs, budget=budget)) == expected
