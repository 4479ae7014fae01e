from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.errors import CheckpointError
from headrace.layers.rope import cos_sin_table
from headrace.layers.rope_parameters import RopeParameters
from headrace.models.base import build_model
from headrace.models.config import ModelConfig
from headrace_kernels.dispatch import KernelFacts, choose


@pytest.fixture(scope="module")
def reference(tiny_hf_model: Callable[..., Any]) -> Any:
    return tiny_hf_model("Llama")


@pytest.fixture
def config(reference: Any, hf_config: Callable[[Any], dict[str, Any]]) -> ModelConfig:
    return ModelConfig.from_hf(hf_config(reference))


def test_a_missing_tensor_is_named(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    state = reference.state_dict()
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 .*: model.layers.1.self_attn.k_proj"):
        paged_model(config, as_weights(state))


def test_an_unexpected_tensor_is_named(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    state = {**reference.state_dict(), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    with pytest.raises(CheckpointError, match="does not know: model.layers.0.self_attn.q_pro"):
        paged_model(config, as_weights(state))


def test_a_bias_of_zeros_that_the_architecture_lacks_is_left_out(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    state = {**reference.state_dict(), "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    paged_model(config, as_weights(state))


def test_a_wrong_shape_is_named(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    state = {**reference.state_dict(), "model.norm.weight": torch.zeros(63)}
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \(63,\).*asks for \(64,"):
        paged_model(config, as_weights(state))


def test_a_tensor_that_comes_twice_is_named(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    weights = as_weights(reference.state_dict())
    with pytest.raises(CheckpointError, match="has tensor model.embed_tokens.weight twice"):
        paged_model(config, [*weights, weights[0]])


def test_rotary_frequencies_of_old_checkpoints_are_left_out(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    state = reference.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    paged_model(config, as_weights(state))


def test_whether_a_gguf_head_is_tied_is_seen_from_its_tensors(
    reference: Any, config: ModelConfig, paged_model: Any, as_weights: Any
) -> None:
    config = dataclasses.replace(config, tie_word_embeddings=None)
    state = reference.state_dict()
    hidden = torch.randn(1, 64)
    untied = paged_model(config, as_weights(state)).model
    expected = hidden @ state["lm_head.weight"].T
    torch.testing.assert_close(untied.compute_logits(hidden), expected)
    del state["lm_head.weight"]
    tied = paged_model(config, as_weights(state)).model
    expected = hidden @ state["model.embed_tokens.weight"].T
    torch.testing.assert_close(tied.compute_logits(hidden), expected)
    assert len({p.data_ptr() for p in tied.parameters()}) == len(list(tied.parameters()))
    assert sum(p.numel() for p in tied.parameters()) == config.num_parameters


def test_more_positions_than_the_model_knows_are_refused(config: ModelConfig) -> None:
    facts = KernelFacts(
        device="cpu", arch="any", dtype=torch.float32, head_dim=config.head_dim, page_size=16
    )
    with pytest.raises(CheckpointError, match="knows 256 positions, 257 were asked for"):
        build_model(
            config, dtype=torch.float32, device="cpu", kernels=choose(facts), max_positions=257
        )


def test_stored_frequency_factors_are_llama3_scaling_worked_out() -> None:
    llama3 = RopeParameters(
        rope_type="llama3",
        rope_theta=500_000.0,
        rotary_dim=64,
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        factor=8.0,
    )
    plain = dataclasses.replace(llama3, rope_type="default")
    cpu = torch.device("cpu")

    def angles(rope: RopeParameters) -> torch.Tensor:
        cos, sin = cos_sin_table(rope, 2, cpu)[1].double()
        return torch.atan2(sin, cos)

    factors = tuple((angles(plain) / angles(llama3)).tolist())
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0)
    stored = dataclasses.replace(plain, frequency_factors=factors)
    torch.testing.assert_close(
        cos_sin_table(stored, 64, cpu), cos_sin_table(llama3, 64, cpu), atol=1e-5, rtol=0
    )


def test_dynamic_scaling_grows_with_the_context_that_is_served() -> None:
    rope = RopeParameters(
        rope_type="dynamic",
        rope_theta=10_000.0,
        rotary_dim=64,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        factor=2.0,
    )
    cpu = torch.device("cpu")
    plain = cos_sin_table(dataclasses.replace(rope, rope_type="default"), 128, cpu)
    torch.testing.assert_close(cos_sin_table(rope, 128, cpu), plain, atol=1e-5, rtol=0)
    assert (cos_sin_table(rope, 256, cpu)[:128] - plain).abs().max() > 0.1
