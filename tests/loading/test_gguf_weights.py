"""Names, row order and dequantization into parameters of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from headrace.errors import CheckpointError
from headrace.loading import streaming
from headrace.loading.gguf import GGUFFile
from headrace.loading.gguf_weights import GGUFTensor, gguf_weights, rope_frequency_factors

WriteGGUF = Callable[..., Path]


def weights_of(path: Path) -> dict[str, GGUFTensor]:
    return {weight.name: weight for weight in gguf_weights(GGUFFile(path))}


def read(weight: GGUFTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(weight.shape, float("nan"), dtype=dtype)
    weight.read_into(out)
    return out


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k: halves to neighbours."""
    order = [
        head * (len(rows) // heads) + half * (len(rows) // heads // 2) + i
        for head in range(heads)
        for i in range(len(rows) // heads // 2)
        for half in (0, 1)
    ]
    return rows[order]


GGUF_TO_HF = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_q.bias": "model.layers.0.self_attn.q_proj.bias",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_k.bias": "model.layers.0.self_attn.k_proj.bias",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    "blk.0.attn_q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
    "blk.0.attn_k_norm.weight": "model.layers.0.self_attn.k_norm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.31.ffn_down.weight": "model.layers.31.mlp.down_proj.weight",
}


@pytest.mark.parametrize(
    ("arch", "interleaved"),
    [("llama", True), ("smollm3", True), ("qwen2", False), ("qwen3", False)],
)
def test_names_and_row_order(
    write_gguf: WriteGGUF, rng: np.random.Generator, arch: str, interleaved: bool
) -> None:
    heads = {"attn_q": 4, "attn_k": 2}
    hf, stored = {}, {}
    for name, hf_name in GGUF_TO_HF.items():
        rows = 8 * heads.get(name.split(".")[-2], 3)
        shape = (rows,) if "norm" in name or name.endswith("bias") else (rows, 6)
        values = rng.standard_normal(shape, dtype=np.float32)
        hf[hf_name] = values
        stem = name.split(".")[-2]
        stored[name] = interleave(values, heads[stem]) if interleaved and stem in heads else values
    counts = {f"{arch}.attention.head_count": 4, f"{arch}.attention.head_count_kv": 2}

    weights = weights_of(write_gguf(stored, counts, arch))

    assert set(weights) == set(hf)
    for name, values in hf.items():
        assert weights[name].shape == values.shape
        assert weights[name].nbytes == values.nbytes
        assert torch.equal(read(weights[name]), torch.from_numpy(values)), name
    assert weights["model.layers.0.self_attn.q_proj.weight"].interleaved_heads == (
        4 if interleaved else None
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_pieces_join_without_a_seam(
    write_gguf: WriteGGUF, rng: np.random.Generator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces of 4096 values: 230 rows of 256 are several, the last one short, and q's must end
    # between heads, of which each alone is 2560 values.
    monkeypatch.setattr(streaming, "_PIECE_VALUES", 4096)
    quantization = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    raw = rng.integers(0, 100, (230, 256 // block_size * block_bytes), dtype=np.uint8)
    path = write_gguf(
        {"blk.0.ffn_up.weight": (raw, quantization), "blk.0.attn_q.weight": (raw, quantization)},
        {"llama.attention.head_count": 23},
    )
    expected = torch.from_numpy(gguf.quants.dequantize(raw, quantization).astype(np.float32))

    weights = weights_of(path)
    up, q = (
        weights[f"model.layers.0.{stem}.weight"] for stem in ("mlp.up_proj", "self_attn.q_proj")
    )

    assert up.quantization == kind
    assert bytes(up.raw) == bytes(q.raw) == raw.tobytes()
    assert torch.equal(read(up), expected)
    assert torch.equal(interleaved(read(q), 23), expected)
    assert torch.equal(read(up, torch.bfloat16), expected.bfloat16())


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.from_numpy(interleave(rows.numpy(), heads))


def test_reads_into_a_strided_slice_of_a_fused_parameter(
    write_gguf: WriteGGUF, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((8, 4), dtype=np.float32)
    path = write_gguf({"blk.0.attn_q.weight": values}, {"llama.attention.head_count": 2})
    (weight,) = weights_of(path).values()
    expected = read(weight)

    by_rows = torch.full((20, 4), -1.0)
    weight.read_into(by_rows[5:13])
    assert torch.equal(by_rows[5:13], expected)
    assert (by_rows[:5] == -1).all() and (by_rows[13:] == -1).all()

    transposed = torch.full((4, 20), -1.0)
    weight.read_into(transposed.T[5:13])
    assert torch.equal(transposed[:, 5:13], expected.T)
    assert (transposed[:, :5] == -1).all() and (transposed[:, 13:] == -1).all()


def test_wrong_shape_names_the_tensor_and_both_shapes(write_gguf: WriteGGUF) -> None:
    path = write_gguf({"output.weight": np.zeros((4, 2), dtype=np.float32)})
    (weight,) = weights_of(path).values()
    with pytest.raises(CheckpointError, match=r"'output.weight' has the shape \(4, 2\).*\(2, 4\)"):
        weight.read_into(torch.empty(2, 4))


@pytest.mark.parametrize(
    ("tensor", "arch", "metadata", "message"),
    [
        ("output.weight", "gpt2", {}, "architecture is 'gpt2'. Known .*: llama, smollm3"),
        ("blk.0.ffn_gate_exps.weight", "llama", {}, "'blk.0.ffn_gate_exps.weight' has no place"),
        ("blk.0.attn_q.extra", "llama", {}, "'blk.0.attn_q.extra' has no place"),
        ("blk.0.attn_q.weight", "llama", {}, "8 rows, which None heads cannot share"),
        (
            "blk.0.attn_k.weight",
            "llama",
            {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 3},
            "8 rows, which 3 heads cannot share",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    write_gguf: WriteGGUF, tensor: str, arch: str, metadata: dict[str, int], message: str
) -> None:
    path = write_gguf({tensor: np.zeros((8, 4), dtype=np.float32)}, metadata, arch)
    with pytest.raises(CheckpointError, match=message):
        weights_of(path)


def test_rope_factors_are_configuration_not_a_weight(write_gguf: WriteGGUF) -> None:
    factors = np.array([1, 1, 8, 32], dtype=np.float32)
    norm = np.ones(4, dtype=np.float32)
    path = write_gguf({"rope_freqs.weight": factors, "output_norm.weight": norm})
    assert set(weights_of(path)) == {"model.norm.weight"}
    assert rope_frequency_factors(GGUFFile(path)) == (1, 1, 8, 32)


def test_real_weights(smollm2_path: Path, smollm2_by_gguf: gguf.GGUFReader) -> None:
    weights = weights_of(smollm2_path)
    assert len(weights) == len(smollm2_by_gguf.tensors) == 272
    stored = {tensor.name: tensor for tensor in smollm2_by_gguf.tensors}
    layer = "model.layers.29."
    for name, hf_name, heads in (
        ("output_norm.weight", "model.norm.weight", None),
        ("blk.29.ffn_down.weight", layer + "mlp.down_proj.weight", None),
        ("blk.29.attn_q.weight", layer + "self_attn.q_proj.weight", 9),
        ("blk.29.attn_k.weight", layer + "self_attn.k_proj.weight", 3),
    ):
        values = read(weights[hf_name]).numpy()
        if heads is not None:
            values = interleave(values, heads)
        expected = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(values, expected.reshape(values.shape)), name


def test_a_scale_that_is_not_finite_is_refused_by_name(
    write_gguf: WriteGGUF, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((4, 64), dtype=np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    raw[2, 0:2] = np.array(np.inf, dtype=np.float16).tobytes()[0], 0x7C
    path = write_gguf({"output.weight": (raw, gguf.GGMLQuantizationType.Q4_0)})
    with pytest.raises(CheckpointError, match="tensor 'output.weight' has values that are not fin"):
        read(weights_of(path)["lm_head.weight"], torch.bfloat16)
