"""Models whose layers are kept in 4 or 8 bits, against the same weights dequantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantization.stored_layers import CASES, write_checkpoint

from headrace.engine.plan import stored_weights
from headrace.layers.matrix import Matrix
from headrace.loading.checkpoint import open_checkpoint
from headrace.models.config import ModelConfig
from headrace.quantization.load_time import LoadTimeForm
from headrace.quantization.stored_form import StoredForm

LENGTH = 24
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}


@pytest.fixture(scope="module")
def reference(tiny_hf_model: Callable[..., Any]) -> Any:
    return tiny_hf_model("Qwen2", **SIZES, initializer_range=0.05)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(0, 160, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


FORMS: list[tuple[str, bool, float]] = [
    # Activations of packed products get 8 bits in groups of 32.
    ("gptq 32", False, 0.02),
    ("gptq asym", False, 0.02),
    ("awq 128", False, 0.02),
    ("packed asym", False, 0.02),
    ("packed 8 bits", False, 0.02),
    ("int8", False, 0.02),
    # 8 bits for each row, and 3 bits of mantissa.
    ("int8", True, 0.03),
    ("fp8 tensor", True, 0.06),
    ("fp8 channel", True, 0.06),
    ("fp8 block inverse", True, 0.06),
]


@pytest.mark.parametrize(("name", "scaled", "allowed"), FORMS)
def test_logits_are_those_of_the_dequantized_weights(
    name: str,
    scaled: bool,
    allowed: float,
    reference: Any,
    hf_config: Any,
    paged_model: Any,
    as_weights: Any,
    tokens: list[int],
    tmp_path: Path,
) -> None:
    state = reference.state_dict()
    dense = write_checkpoint(tmp_path, state, hf_config(reference), CASES[name])
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.hf_config is not None
    config = ModelConfig.from_hf(checkpoint.hf_config)
    expected = paged_model(config, as_weights(dense)).chunked(tokens, LENGTH)
    model = paged_model(
        config,
        stored_weights(checkpoint, config),
        method=StoredForm(scaled=scaled),
        kernels={"scaled_linear": "reference"},
    )
    matrices = [part for part in model.model.layers.modules() if isinstance(part, Matrix)]
    assert [len(matrix.stored) for matrix in matrices] == [1] * 4 * 2, "fused ones are one product"
    logits = model.chunked(tokens, LENGTH)
    assert relative_error(logits, expected) < allowed
    assert torch.equal(model.chunked(tokens, 5), logits), "rows depend on themselves only"
    dequantized = paged_model(config, stored_weights(checkpoint, config))
    assert relative_error(dequantized.chunked(tokens, LENGTH), expected) < 1e-5


def test_ignored_layers_stay_dense(
    reference: Any,
    hf_config: Any,
    paged_model: Any,
    as_weights: Any,
    tokens: list[int],
    tmp_path: Path,
) -> None:
    skip = ("layers.0.self_attn.o_proj", "layers.1.self_attn.k_proj")
    state, case = reference.state_dict(), CASES["fp8 channel"]
    dense = write_checkpoint(tmp_path, state, hf_config(reference), case, skip=skip)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.hf_config is not None
    config = ModelConfig.from_hf(checkpoint.hf_config)
    model = paged_model(config, stored_weights(checkpoint, config), method=StoredForm(scaled=True))
    expected = paged_model(config, as_weights(dense)).chunked(tokens, LENGTH)
    assert relative_error(model.chunked(tokens, LENGTH), expected) < 0.06
    first, second = (layer.attention for layer in model.model.layers)
    assert first.o_proj.weight.dense is not None and first.qkv_proj.weight.dense is None
    assert second.qkv_proj.weight.dense is not None, "one of three keeps them from 8 bits"


@pytest.mark.parametrize(
    ("quantization", "packed", "allowed"),
    [("int8", False, 0.03), ("int8", True, 0.03), ("fp8", False, 0.08)],
)
def test_rounding_at_load(
    quantization: str,
    packed: bool,
    allowed: float,
    reference: Any,
    hf_config: Any,
    paged_model: Any,
    as_weights: Any,
    tokens: list[int],
) -> None:
    config, state = ModelConfig.from_hf(hf_config(reference)), reference.state_dict()
    expected = paged_model(config, as_weights(state)).chunked(tokens, LENGTH)
    method = LoadTimeForm(quantization, packed=packed)
    model = paged_model(config, as_weights(state), method=method)
    assert model.model.embedding.weight.dense is not None
    logits = model.chunked(tokens, LENGTH)
    assert 1e-4 < relative_error(logits, expected) < allowed
    assert torch.equal(model.chunked(tokens, 5), logits)
