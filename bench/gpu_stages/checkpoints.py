"""Checkpoints of real shapes with random weights, made where they are needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN3_8B: dict[str, Any] = LLAMA_8B | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3_06B: dict[str, Any] = QWEN3_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = QWEN3_06B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
CONFIGS = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-8B": QWEN3_8B, "Qwen3-0.6B": QWEN3_06B, "tiny": TINY}

NOISE_ELEMENTS = 1 << 24
"""Random numbers are made once and repeated: a product of them takes the time it takes."""


def random_checkpoint(name: str, folder: Path, seed: int) -> Path:
    """The folder of a bfloat16 checkpoint of one of CONFIGS; made unless it is there."""
    path = folder / f"{name}-random-{seed}"
    weights = path / "model.safetensors"
    if weights.exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    shapes = dict(_tensors(config))
    header: dict[str, Any] = {}
    end = 0
    for tensor, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(seed)
    noise = _bfloat16(rng.standard_normal(NOISE_ELEMENTS, dtype=np.float32) * 0.02)
    draft = weights.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor, shape in shapes.items():
            left = int(np.prod(shape))
            if tensor.endswith("norm.weight"):
                file.write(_bfloat16(np.ones(left, np.float32)))
                continue
            while left:
                count = min(left, len(noise))
                file.write(noise[:count])
                left -= count
    (path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    draft.rename(weights)
    return path


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Hugging Face's names and shapes."""
    hidden, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", [hidden]
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", [width, hidden]
        if config["model_type"] == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", [dim]
            yield f"{prefix}.self_attn.k_norm.weight", [dim]
        yield f"{prefix}.self_attn.o_proj.weight", [hidden, q]
        yield f"{prefix}.post_attention_layernorm.weight", [hidden]
        yield f"{prefix}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.up_proj.weight", [inner, hidden]
        yield f"{prefix}.mlp.down_proj.weight", [hidden, inner]
    yield "model.norm.weight", [hidden]
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", [vocabulary, hidden]


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32: rounded towards zero, which is no matter here."""
    return np.ascontiguousarray(values.view(np.uint16)[1::2])
