from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import CheckpointError
from headrace.loading.checkpoint import open_checkpoint
from headrace.models.config import ModelConfig
from headrace.models.registry import known_architectures

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 2,
}


def test_defaults_of_a_short_config() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.rope.rope_theta == 10_000.0
    assert config.rope.rotary_dim == 16
    assert config.traits.windows == (None, None)
    assert config.tie_word_embeddings is False
    assert config.eos_token_ids == ()
    assert config.checkpoint_dtype == "float32"
    assert config.kv_elements_per_token == 2 * 2 * 4 * 16


def test_mistral_has_a_window_unless_it_says_null() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_hf(mistral).traits.windows == (4096, 4096)
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).traits.windows == (None, None)


def test_qwen_has_a_window_only_if_it_is_turned_on() -> None:
    qwen = LLAMA | {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 64,
        "max_window_layers": 1,
    }
    assert ModelConfig.from_hf(qwen).traits.windows == (None, None)
    assert ModelConfig.from_hf(qwen | {"use_sliding_window": True}).traits.windows == (None, 64)


def test_smollm3_leaves_out_every_fourth_rope() -> None:
    config = ModelConfig.from_hf(
        LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5}
    )
    assert config.traits.rope_layers == (True, True, True, False, True)
    assert config.tie_word_embeddings is True
    assert config.rope.rope_theta == 2_000_000.0


def test_stop_tokens_of_both_files_are_united() -> None:
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": 7}, {"eos_token_id": [9, 7]})
    assert config.eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not known.*Qwen3ForCaus"),
        ({"architectures": None}, "no 'architectures'"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"hidden_size": "64"}, "'hidden_size' must be an integer, not '64'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be at least 1, not 0"),
        ({"rms_norm_eps": "x"}, "'rms_norm_eps' must be a number"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 kv heads"),
        ({"hidden_act": "gelu"}, "'hidden_act' 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized by .hqq.*gptq.*GGUF"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: 'rope_type' 'mrope' is not known"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no 'factor'"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope needs 'short_factor'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "'short_factor' must be a list of 8",
        ),
        ({"rope_scaling": 3}, "'rope_scaling' must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.2}}, "covers 3 of 16 values"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


def test_unknown_layer_types_are_named() -> None:
    qwen = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}
    with pytest.raises(CheckpointError, match="'layer_types' names linear_attention; known are"):
        ModelConfig.from_hf(qwen | {"layer_types": ["linear_attention", "full_attention"]})


def test_gguf_metadata() -> None:
    config = ModelConfig.from_gguf(GGUF)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.num_kv_heads, config.head_dim) == (3, 2, 16)
    assert config.rope.rope_theta == 500_000.0
    assert config.eos_token_ids == (1, 2)
    assert config.checkpoint_dtype == "Q4_K"
    assert config.tie_word_embeddings is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "GGUF architecture 'mamba' is not known.*llama, qwen2"),
        ({"llama.block_count": None}, r"GGUF metadata, llama\.\* has no 'block_count'"),
        (
            {"llama.attention.head_count_kv": [1, 2]},
            r"'attention.head_count_kv' must be an integer",
        ),
        (
            {"llama.rope.scaling.type": "longrope"},
            "'longrope' is not known. Known are: none, lin",
        ),
    ],
)
def test_gguf_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_gguf(GGUF | changes)


def test_gguf_frequency_factors_are_checked() -> None:
    factors = tuple(float(i + 1) for i in range(8))
    assert ModelConfig.from_gguf(GGUF, factors).rope.frequency_factors == factors
    with pytest.raises(CheckpointError, match="rope_freqs.weight has 3 values, but 8 pairs"):
        ModelConfig.from_gguf(GGUF, factors[:3])


def test_smollm2(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.gguf_metadata is not None
    config = ModelConfig.from_gguf(checkpoint.gguf_metadata, checkpoint.rope_frequency_factors)
    assert config.num_parameters == 134_515_008
    assert config.kv_elements_per_token * 2 == 23_040
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.eos_token_ids == (2,)
    assert config.checkpoint_dtype == "Q4_1"


def test_reading_a_config_imports_no_torch() -> None:
    code = (
        "import sys, headrace.models.config, headrace.models.registry;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "server:kernels"})
    assert "Qwen3ForCausalLM" in known_architectures()
