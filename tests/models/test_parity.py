"""Logits against transformers, on tiny random checkpoints of every family, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.loading.checkpoint import open_checkpoint
from headrace.models.config import ModelConfig

MAX_ERROR = 1e-4
LENGTH = 100

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "llama one head a group": ("Llama", {"num_key_value_heads": 4}),
    "llama theta": ("Llama", rope(rope_type="default", rope_theta=500.0)),
    "rope linear": ("Llama", rope(rope_type="linear", factor=4.0)),
    "rope dynamic": ("Llama", rope(rope_type="dynamic", factor=4.0)),
    "rope yarn": ("Llama", rope(**YARN, original_max_position_embeddings=32)),
    "rope yarn exact borders": (
        "Llama",
        rope(**YARN, original_max_position_embeddings=32, truncate=False, beta_fast=16.0),
    ),
    "rope yarn mscale": (
        "Llama",
        rope(**YARN, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.7),
    ),
    "rope yarn attention factor": (
        "Llama",
        rope(**YARN, original_max_position_embeddings=32, attention_factor=1.3),
    ),
    "rope llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "rope longrope": (
        "Llama",
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}},
    ),
    "rope longrope factor": (
        "Llama",
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32, "factor": 3.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3 biases": ("Qwen3", {"attention_bias": True}),
    "qwen3 layer types": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 70,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3 yarn": ("Qwen3", rope(**YARN, original_max_position_embeddings=32)),
    "smollm3": ("SmolLM3", {}),
    "smollm3 untied biases": (
        "SmolLM3",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3 window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 20}),
    "smollm3 listed": ("SmolLM3", {"no_rope_layers": [1, 0, 0, 1]}),
}


@torch.inference_mode()
def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    assert logits.std() > 0.5, "logits this small would hide an error"
    return logits


@pytest.mark.parametrize(("family", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_logits(
    family: str,
    options: dict[str, Any],
    tiny_hf_model: Callable[..., Any],
    hf_config: Callable[[Any], dict[str, Any]],
    paged_model: Any,
    as_weights: Any,
) -> None:
    reference = tiny_hf_model(family, **options)
    config = ModelConfig.from_hf(hf_config(reference))
    model = paged_model(config, as_weights(reference.state_dict()))
    tokens = torch.randint(0, config.vocab_size, (LENGTH,)).tolist()
    expected = reference_logits(reference, tokens)

    assert config.num_parameters == sum(p.numel() for p in reference.parameters())
    prefill = model.chunked(tokens, LENGTH)
    assert (prefill - expected).abs().max() < MAX_ERROR
    step_by_step = model.chunked(tokens, 1)
    assert torch.equal(step_by_step, prefill)


def test_longrope_takes_the_short_factors_for_a_short_context(
    tiny_hf_model: Callable[..., Any],
    hf_config: Callable[[Any], dict[str, Any]],
    paged_model: Any,
    as_weights: Any,
) -> None:
    rope_parameters = {**LONGROPE, "original_max_position_embeddings": 64}
    reference = tiny_hf_model("Llama", rope_parameters=rope_parameters)
    config = ModelConfig.from_hf(hf_config(reference))
    tokens = torch.randint(0, config.vocab_size, (64,)).tolist()
    expected = reference_logits(reference, tokens)
    weights = as_weights(reference.state_dict())
    short = paged_model(config, weights, max_positions=64).chunked(tokens, 64)
    assert (short - expected).abs().max() < MAX_ERROR
    long = paged_model(config, weights).chunked(tokens, 64)
    assert (long - expected).abs().max() > 0.1


def test_through_safetensors_with_the_older_rope_keys(
    tiny_hf_model: Callable[..., Any], paged_model: Any, tmp_path: Path
) -> None:
    reference = tiny_hf_model("Llama", rope_parameters=LLAMA3, tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.hf_config is not None
    older = dict(checkpoint.hf_config)
    older["rope_scaling"] = {**older.pop("rope_parameters"), "type": "llama3"}
    older["rope_theta"] = older["rope_scaling"].pop("rope_theta")
    config = ModelConfig.from_hf(older, checkpoint.generation_config)
    assert config == ModelConfig.from_hf(checkpoint.hf_config, checkpoint.generation_config)
    tokens = torch.randint(0, config.vocab_size, (LENGTH,)).tolist()
    logits = paged_model(config, checkpoint.weights()).chunked(tokens, LENGTH)
    assert (logits - reference_logits(reference, tokens)).abs().max() < MAX_ERROR


@pytest.mark.slow
def test_smollm2_on_its_real_weights(smollm2_path: Path, paged_model: Any) -> None:
    import transformers

    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.gguf_metadata is not None
    config = ModelConfig.from_gguf(checkpoint.gguf_metadata, checkpoint.rope_frequency_factors)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent,
        gguf_file=smollm2_path.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    assert config.num_parameters == sum(p.numel() for p in reference.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    text = "The headrace brings water from the reservoir to the turbine. In 1882, engineers at "
    tokens = tokenizer(text * 4)["input_ids"]
    expected = reference_logits(reference, tokens)
    model = paged_model(config, checkpoint.weights())
    logits = model.chunked(tokens, len(tokens))
    assert (logits - expected).abs().max() < 1e-3
    assert torch.equal(model.chunked(tokens, 1), logits)

    bf16 = paged_model(config, checkpoint.weights(), dtype=torch.bfloat16)
    error = bf16.chunked(tokens, len(tokens)).log_softmax(-1) - expected.log_softmax(-1)
    own = error.gather(1, torch.tensor(tokens[1:] + tokens[:1])[:, None])
    assert own.abs().mean() < 0.02
