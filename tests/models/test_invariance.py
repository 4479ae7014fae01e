"""What a request computes depends only on its own tokens: equal bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.models.config import ModelConfig

VOCAB = 160


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(
    request: pytest.FixtureRequest,
    tiny_hf_model: Callable[..., Any],
    hf_config: Callable[[Any], dict[str, Any]],
    paged_model: Any,
    as_weights: Any,
) -> Any:
    """Full and sliding layers, QK-norm, biases, three query heads a group."""
    reference = tiny_hf_model(
        "Qwen3",
        num_attention_heads=6,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=30,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    config = ModelConfig.from_hf(hf_config(reference))
    return paged_model(config, as_weights(reference.state_dict()), dtype=request.param)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 16, 50, 64])
def test_chunks(model: Any, chunk: int) -> None:
    prompt = tokens(90, 1)
    assert torch.equal(model.chunked(prompt, chunk), model.chunked(prompt, len(prompt)))


def test_neighbours_and_their_lengths(model: Any) -> None:
    prompt = tokens(90, 1)
    alone = model.chunked(prompt, len(prompt))
    model.step({"long": tokens(130, 2), "short": tokens(3, 3)})
    beside = [
        model.step({"long": tokens(1, 4), "own": prompt[:40], "short": tokens(1, 5)})["own"],
        model.step({"own": prompt[40:41], "long": tokens(1, 6)})["own"],
        model.step({"new": tokens(20, 7), "own": prompt[41:42], "long": tokens(9, 8)})["own"],
        model.step({"long": tokens(40, 9), "own": prompt[42:90]})["own"],
    ]
    assert torch.equal(torch.cat(beside), alone)
    for request in ("own", "long", "short", "new"):
        model.forget(request)


def test_a_batch_of_decodes(model: Any) -> None:
    prompts = {f"request {i}": tokens(5 + 11 * i, i) for i in range(11)}
    together = []
    model.step({name: prompt[:-3] for name, prompt in prompts.items()})
    for i in (-3, -2, -1):
        together.append(model.step({name: [prompt[i]] for name, prompt in prompts.items()}))
    for name in prompts:
        model.forget(name)
    for name, prompt in prompts.items():
        alone = model.chunked(prompt, len(prompt))[-3:]
        assert torch.equal(torch.cat([step[name] for step in together]), alone), name


def test_logits_of_any_number_of_rows(model: Any) -> None:
    hidden = torch.randn(300, 64)
    whole = model.model.compute_logits(hidden)
    assert whole.shape == (300, VOCAB)
    for first, last in ((0, 1), (1, 4), (4, 20), (20, 300), (7, 7)):
        assert torch.equal(model.model.compute_logits(hidden[first:last]), whole[first:last])
