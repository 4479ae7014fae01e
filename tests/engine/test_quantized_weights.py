"""What is planned for quantized weights is what is loaded, and what cannot be is refused first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.quantization.stored_layers import CASES, write_checkpoint
from torch import Tensor

from headrace import cli
from headrace.config import GIB, DeviceOptions, EngineConfig, ModelOptions, SchedulerOptions
from headrace.engine.build import build_engine
from headrace.engine.plan import dequantized_tensors, make_plan
from headrace.engine.resolution import Hardware, ModelFacts, resolve
from headrace.errors import CheckpointError, ConfigError
from headrace_kernels import native

HIDDEN, INNER, VOCAB, HEAD = 128, 256, 64, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
IN_LAYERS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
OUTSIDE = VOCAB * HIDDEN + 3 * HIDDEN

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason="needs the C++ kernels: products of packed weights"
)


def state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    tensors = {f"model.layers.0.{name}.weight": torch.randn(s) for name, s in shapes.items()}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    tensors["model.embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[[str], Path]:
    """`quantized("gptq 128")` -> the folder of a tiny model in that scheme."""

    def write(name: str) -> Path:
        write_checkpoint(tmp_path, state(), CONFIG, CASES[name])
        return tmp_path

    return write


@pytest.fixture
def unquantized(tmp_path: Path) -> Path:
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def config(folder: Path, *kernels: str, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        model_options=ModelOptions(**options),
        scheduler=SchedulerOptions(max_num_seqs=2),
        device=DeviceOptions(device="cpu", kernel=kernels, threads=2),
    )


SCALED = "scaled_linear=reference"


@needs_native
@pytest.mark.parametrize(
    ("name", "kernels", "option", "weights", "layer_bytes"),
    [
        ("gptq 128", (), "packed", "packed", IN_LAYERS * (16 + 2) // 32),
        ("gptq 128", (), "exact", "exact", IN_LAYERS * (16 + 2) // 32),
        ("awq 32", (), "packed", "packed", IN_LAYERS * (16 + 4) // 32),
        ("awq 32", (), "exact", "exact", IN_LAYERS * (16 + 8) // 32),
        ("awq 32", (), "dense", "dense", None),
        ("packed 128", (), "exact", "exact", IN_LAYERS * (16 + 8) // 32),
        ("gptq ordered", (), "packed", "dense", None),
        ("int8", (), "packed", "packed", IN_LAYERS * (32 + 2) // 32),
        ("int8", (SCALED,), "packed", "scaled", IN_LAYERS + 4 * (4 * HIDDEN + 2 * INNER + HIDDEN)),
        ("fp8 block", (SCALED,), "packed", "scaled", IN_LAYERS + 4 * IN_LAYERS // 128**2),
        ("fp8 block", (SCALED,), "exact", "dense", None),
        ("fp8 channel", (), "packed", "dense", None),
    ],
)
def test_what_is_planned_is_loaded(
    name: str,
    kernels: tuple[str, ...],
    option: str,
    weights: str,
    layer_bytes: int | None,
    quantized: Callable[[str], Path],
) -> None:
    asked = config(quantized(name), *kernels, weights=option)
    plan = make_plan(asked)
    assert plan.resolved.weights == weights
    item = 2 if plan.resolved.dtype == "bfloat16" else 4
    expected = OUTSIDE * item + (layer_bytes or IN_LAYERS * item)
    assert plan.resolved.weight_bytes == expected
    engine = build_engine(asked)
    norms = 3 * HIDDEN * (4 - item)  # which are always in fp32
    assert engine.info.weight_bytes == expected + norms
    assert bool(dequantized_tensors(plan)) == (weights == "dense")


@needs_native
@pytest.mark.parametrize(
    ("quantization", "kernels", "weights"),
    [("int8", (), "packed"), ("int8", (SCALED,), "scaled"), ("fp8", (SCALED,), "scaled")],
)
def test_rounding_at_load_is_planned(
    quantization: str, kernels: tuple[str, ...], weights: str, unquantized: Path
) -> None:
    # --dtype is the type of activations then, and of what is not rounded.
    asked = config(unquantized, *kernels, quantization=quantization, dtype="float32")
    plan = make_plan(asked)
    assert plan.resolved.weights == weights
    assert f"layers in {quantization}" in plan.resolved.why["weight_bytes"]
    assert build_engine(asked).info.weight_bytes == plan.resolved.weight_bytes
    assert plan.resolved.weight_bytes < OUTSIDE * 4 + IN_LAYERS * 1.07


def test_what_cannot_be_rounded_is_refused(unquantized: Path) -> None:
    with pytest.raises(ConfigError, match=r"--quantization fp8: no kernels .* on cpu\. Use int8"):
        make_plan(config(unquantized, quantization="fp8"))
    with pytest.raises(ConfigError, match="--quantization int8: --weights dense. Leave it out"):
        make_plan(config(unquantized, quantization="int8", weights="dense"))


def test_quantized_weights_are_not_rounded_again(quantized: Callable[[str], Path]) -> None:
    folder = quantized("awq 128")
    with pytest.raises(ConfigError, match=r"quantized already \(awq int4, groups of 128\)"):
        make_plan(config(folder, quantization="int8"))


def test_missing_parts_are_found_before_weights_are_read(quantized: Callable[[str], Path]) -> None:
    folder = quantized("gptq 128")
    changed = json.loads((folder / "config.json").read_text())
    changed["quantization_config"]["group_size"] = 32
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"scales is F16 .* as its quantization_con"):
        make_plan(config(folder))


def test_integers_without_a_scheme_are_refused(quantized: Callable[[str], Path]) -> None:
    folder = quantized("fp8 channel")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="proj.weight is stored as F8_E4M3, but the quantiz"):
        make_plan(config(folder))


@needs_native
def test_the_plan_shows_the_scheme_and_its_bytes(
    quantized: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantized("awq 32")
    assert cli.main(["plan", str(folder), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "awq int4, groups of 32" in shown
    assert "quantized weights as they are" in shown
    assert cli.main(["plan", str(folder), "--device", "cpu", "--weights", "dense"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "awq int4, groups of 32" in shown
    assert "dequantized to" in shown and ": --weights dense" in shown


def test_a_gpu_keeps_what_its_kernels_take() -> None:
    model = ModelFacts(
        name="m",
        architecture="LlamaForCausalLM",
        num_parameters=1000,
        max_position_embeddings=64,
        kv_elements_per_token=4,
        kv_rows_per_token=2,
        checkpoint_dtype="bfloat16",
        vocab_size=10,
        packed_parameters=800,
        packed_bytes=900,
        scaled_parameters=800,
        scaled_bytes=810,
        dtype_dequantizes=False,
    )

    def weights(*kernels: str, **options: str) -> tuple[str, int]:
        gpu = Hardware(
            device="cuda:0",
            name="a GPU",
            cores=1,
            memory_bytes=GIB,
            has_bf16=True,
            product_kernels=kernels,
        )
        chosen = EngineConfig(model_options=ModelOptions(**options))  # type: ignore[arg-type]
        resolved = resolve(chosen, gpu, model)
        return resolved.weights, resolved.weight_bytes

    both = ("quantized_linear", "scaled_linear")
    assert weights(*both) == ("scaled", 2 * 200 + 810)
    assert weights("quantized_linear") == ("packed", 2 * 200 + 900)
    assert weights() == ("dense", 2000)
    assert weights(*both, dtype="bfloat16")[0] == "scaled"
    assert weights(*both, weights="dense")[0] == "dense"
    assert weights(*both, weights="exact")[0] == "exact"
    assert weights("scaled_linear", weights="exact")[0] == "dense"
