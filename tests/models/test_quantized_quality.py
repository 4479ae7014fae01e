"""What each scheme costs on real weights: SmolLM2-135M in bf16 against the same, quantized.

The weights are the GGUF file's, dequantized and rounded to bf16: they have been on one 4-bit grid
and are rounded to another. Integers are rounded to the nearest, without GPTQ's and AWQ's search,
which lowers the error. So the errors against bf16 are those of the format on a small, sensitive
model; the errors against the same weights dequantized are those of our arithmetic.

Rows of 576 inputs have no whole blocks of 128: in "fp8 block" only down_proj is kept in 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantization.stored_layers import CASES, write_checkpoint
from torch import Tensor

from headrace.engine.plan import model_config, stored_weights
from headrace.loading.checkpoint import Checkpoint, open_checkpoint
from headrace.quantization.load_time import LoadTimeForm
from headrace.quantization.method import QuantMethod
from headrace.quantization.stored_form import StoredForm
from headrace.text.gguf_tokenizer import tokenizer_from_gguf

CHUNK, CHUNKS = 256, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
Run = Callable[[Checkpoint, QuantMethod | None, int], Tensor]


@pytest.fixture(scope="module")
def state(smollm2_path: Path) -> dict[str, Tensor]:
    tensors = {}
    for tensor in open_checkpoint(smollm2_path).weights():
        tensors[tensor.name] = torch.empty(tensor.shape, dtype=torch.bfloat16)
        tensor.read_into(tensors[tensor.name])
    return tensors


@pytest.fixture(scope="module")
def tokens(smollm2_path: Path) -> list[int]:
    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.gguf_metadata is not None
    decisions = Path(__file__).parents[2] / "docs" / "decisions"
    text = "\n".join(path.read_text() for path in sorted(decisions.glob("000[1-6]-*.md")))
    encoded = tokenizer_from_gguf(checkpoint.gguf_metadata).encode(text).ids
    assert len(encoded) >= CHUNK * CHUNKS
    return encoded[: CHUNK * CHUNKS]


@pytest.fixture(scope="module")
def run(tokens: list[int], paged_model: Any) -> Run:
    """`run(checkpoint, method, activation_bits)` -> log-probabilities [tokens, V]."""

    def logprobs(
        checkpoint: Checkpoint, method: QuantMethod | None, activation_bits: int
    ) -> Tensor:
        config = model_config(checkpoint)
        model = paged_model(
            config,
            stored_weights(checkpoint, config),
            dtype=torch.bfloat16,
            max_positions=CHUNK,
            method=method,
            activation_bits=activation_bits,
        )
        chunks = [
            model.chunked(tokens[first : first + CHUNK], CHUNK, f"chunk {first}")
            for first in range(0, len(tokens), CHUNK)
        ]
        return torch.cat(chunks).log_softmax(-1)

    return logprobs


@pytest.fixture(scope="module")
def bf16(state: dict[str, Tensor], run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bf16")
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = open_checkpoint(folder)
    return checkpoint, run(checkpoint, None, 8)


def divergence(found: Tensor, expected: Tensor, tokens: list[int]) -> tuple[float, float]:
    """Mean KL(expected || found), in nat, and mean error of the log-probability of the next token.

    Of the second half of each chunk: the first has little to go by.
    """
    counts = torch.arange(len(tokens) - 1) % CHUNK
    rows = torch.arange(len(tokens) - 1)[(counts >= CHUNK // 2) & (counts < CHUNK - 1)]
    kl = (expected[rows].exp() * (expected[rows] - found[rows])).sum(-1)
    following = torch.tensor(tokens)[rows + 1]
    error = (found[rows, following] - expected[rows, following]).abs()
    return float(kl.mean()), float(error.mean())


# Case; bits of activations in packed products; and at most, a third above what was measured: mean
# KL and mean error against bf16, and mean KL against the same weights dequantized.
CHECKPOINTS = [
    ("gptq 32", 16, 0.49, 0.84, 0.00056),
    ("gptq 128", 16, 0.68, 1.1, 0.00069),
    ("gptq 128", 8, 0.68, 1.1, 0.0021),
    ("gptq 8 bits", 16, 0.0026, 0.058, 0.00053),
    ("awq 32", 16, 0.33, 0.71, 0.0006),
    ("awq 128", 16, 0.42, 0.81, 0.00057),
    ("packed 128", 16, 0.69, 1.1, 0.00061),
    ("packed asym", 16, 0.33, 0.7, 0.00056),
    ("int8", 8, 0.037, 0.22, 0.032),
    ("fp8 tensor", 8, 0.031, 0.22, 0.015),
    ("fp8 channel", 8, 0.036, 0.23, 0.013),
    ("fp8 block", 8, 0.023, 0.19, 0.0027),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "largest_kl", "largest_error", "own_kl"), CHECKPOINTS)
def test_checkpoints(
    name: str,
    bits: int,
    largest_kl: float,
    largest_error: float,
    own_kl: float,
    state: dict[str, Tensor],
    tokens: list[int],
    bf16: Any,
    run: Run,
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, state, CONFIG, CASES[name])
    checkpoint = open_checkpoint(tmp_path)
    scaled = name.startswith(("fp8", "int8"))
    found = run(checkpoint, StoredForm(scaled=scaled), bits)
    kl, error = divergence(found, bf16[1], tokens)
    arithmetic, _ = divergence(found, run(checkpoint, None, 8), tokens)
    print(f"{name}, {bits}: KL {kl:.5f}, error {error:.4f}, own KL {arithmetic:.5f}")
    assert kl < largest_kl and error < largest_error
    assert arithmetic < own_kl


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "packed", "largest_kl", "largest_error"),
    [("int8", False, 0.035, 0.22), ("int8", True, 0.0054, 0.084), ("fp8", False, 0.035, 0.21)],
)
def test_rounding_at_load(
    quantization: str,
    packed: bool,
    largest_kl: float,
    largest_error: float,
    tokens: list[int],
    bf16: Any,
    run: Run,
) -> None:
    found = run(bf16[0], LoadTimeForm(quantization, packed=packed), 8)
    kl, error = divergence(found, bf16[1], tokens)
    print(f"{quantization} at load, packed {packed}: KL {kl:.5f}, error {error:.4f}")
    assert kl < largest_kl and error < largest_error
