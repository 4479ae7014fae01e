"""Layers of quantized checkpoints: what is kept is what the files say, integers exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.quantization.stored_layers import CASES, E4M3, gptq, gptq_config, packed, rows
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.loading.safetensors import open_safetensors
from headrace.models.fields import Fields
from headrace.models.quantization_config import quantization_scheme
from headrace.quantization.load_time import LoadTimeForm
from headrace.quantization.method import ScaledFormat
from headrace.quantization.scheme import Scheme
from headrace.quantization.stored_form import StoredForm
from headrace.quantization.stored_weight import QuantizedWeight, joined
from headrace_kernels.packed_format import FORMATS, PackedFormat
from headrace_kernels.packed_weight import unpack

OUTPUTS, INPUTS = 144, 384
NAME = "model.layers.0.mlp.up_proj"
IN_GROUPS = [name for name in CASES if not name.startswith(("fp8", "int8"))]
IN_ROWS = [name for name in CASES if name not in IN_GROUPS]


def scheme_of(config: dict[str, Any]) -> Scheme:
    scheme = quantization_scheme(Fields({"quantization_config": config}, "config.json"))
    assert scheme is not None
    return scheme


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., list[Any]]:
    """`on_disk(parts, config)` -> the joined tensors of a file that holds them."""

    def write(parts: dict[str, Tensor], config: dict[str, Any], module: str = NAME) -> list[Any]:
        tensors = {f"{module}.{name}": part.contiguous() for name, part in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        (file,) = open_safetensors(tmp_path)
        return list(joined(file.tensors, scheme_of(config)))

    return write


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS) * torch.rand(OUTPUTS, 1)


def kept(tensor: QuantizedWeight, method: Any) -> Tensor:
    """The weights that the form in which `method` keeps them stands for."""
    fmt = method.format_of(tensor)
    if isinstance(fmt, PackedFormat):
        assert fmt in FORMATS
        memory = torch.full(fmt.shape(*tensor.shape), 255, dtype=torch.uint8)
        method.read(tensor, fmt, (memory,))
        return unpack(memory, fmt)[: tensor.shape[0]]
    dtype = torch.int8 if fmt.dtype == "int8" else E4M3
    values = torch.zeros(tensor.shape, dtype=dtype)
    scale = torch.full(fmt.scale_shape(*tensor.shape), torch.nan)
    method.read(tensor, fmt, (values, scale))
    if fmt.of_blocks:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(values)]
    return values.float() * scale


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_one_weight(name: str, on_disk: Any, weight: Tensor) -> None:
    case = CASES[name]
    layer = case.write(weight)
    (stored,) = on_disk(layer.parts, case.config)
    assert (stored.name, stored.shape) == (f"{NAME}.weight", (OUTPUTS, INPUTS))
    assert stored.nbytes == sum(part.nbytes for part in layer.parts.values())
    dense = torch.full(weight.shape, torch.nan)
    stored.read_into(dense)
    torch.testing.assert_close(dense, layer.dense, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in IN_GROUPS if "ordered" not in name] + ["int8"])
@pytest.mark.parametrize("exact", [False, True])
def test_integers_are_packed(name: str, exact: bool, on_disk: Any, weight: Tensor) -> None:
    case = CASES[name]
    layer = case.write(weight)
    (stored,) = on_disk(layer.parts, case.config)
    method = StoredForm(scaled=False, exact_scales=exact)
    found = kept(stored, method)
    if exact:
        torch.testing.assert_close(found, layer.dense, atol=1e-6, rtol=1e-5)
        return
    # Scale and minimum are rounded to fp16: 2^-11 of the largest weight of a row, each.
    largest = layer.dense.abs().amax(1, keepdim=True)
    assert ((found - layer.dense).abs() <= largest * 2**-10).all()


@pytest.mark.parametrize("name", IN_ROWS)
def test_rows_are_kept_for_8_bit_products(name: str, on_disk: Any, weight: Tensor) -> None:
    case = CASES[name]
    layer = case.write(weight)
    (stored,) = on_disk(layer.parts, case.config)
    found = kept(stored, StoredForm(scaled=True))
    torch.testing.assert_close(found, layer.dense, atol=0, rtol=1e-6)


def test_what_has_no_form_is_dense(on_disk: Any, weight: Tensor) -> None:
    case = CASES["gptq ordered"]
    (stored,) = on_disk(case.write(weight).parts, case.config)
    assert StoredForm(scaled=False).format_of(stored) is None
    assert "desc_act" in stored.scheme.why_dense(stored.shape)
    case = CASES["fp8 block"]
    (stored,) = on_disk(case.write(weight[:, :320]).parts, case.config)
    for scaled in (True, False):
        assert StoredForm(scaled=scaled).format_of(stored) is None
    assert stored.scheme.why_dense(stored.shape) == "its 320 inputs are not a multiple of 128"
    case = CASES["gptq 32"]
    (stored,) = on_disk(case.write(weight).parts, case.config)
    assert StoredForm(scaled=True).format_of(stored) is None


def test_calibrated_scales_are_left_out(on_disk: Any, weight: Tensor) -> None:
    case = CASES["fp8 tensor"]
    calibrated = {name: torch.ones(()) for name in ("input_scale", "k_scale", "v_scale")}
    bias = {"bias": torch.ones(OUTPUTS)}
    tensors = on_disk(case.write(weight).parts | calibrated | bias, case.config)
    assert [tensor.name for tensor in tensors] == [f"{NAME}.weight", f"{NAME}.bias"]


def test_layers_that_are_not_quantized_stay(on_disk: Any, weight: Tensor) -> None:
    for name in ("fp8 channel", "gptq 128"):
        (stored,) = on_disk({"weight": weight}, CASES[name].config)
        assert not isinstance(stored, QuantizedWeight)
        assert StoredForm(scaled=True).format_of(stored) is None


def without(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: part for key, part in parts.items() if key != name}


def test_layers_that_misfit_are_refused_by_name(on_disk: Any, weight: Tensor) -> None:
    layer = gptq(128)(weight)
    with pytest.raises(CheckpointError, match=rf"Layer {NAME} lacks its qzeros"):
        on_disk(without(layer.parts, "qzeros"), gptq_config(128))
    with pytest.raises(CheckpointError, match=rf"Layer {NAME} lacks its g_idx"):
        on_disk(without(layer.parts, "g_idx"), gptq_config(128, desc_act=True))
    on_disk(without(layer.parts, "g_idx"), gptq_config(128))
    with pytest.raises(CheckpointError, match=r"scales is F16 of shape \[3, 144\], not .*12, 144"):
        on_disk(layer.parts, gptq_config(32))
    with pytest.raises(CheckpointError, match=r"scales is F16 of shape \[3, 144\], not .*2, 144"):
        on_disk(layer.parts, gptq_config(128, bits=8))
    with pytest.raises(CheckpointError, match="weight is I8 .* not a matrix of F8_E4M3"):
        on_disk(rows(torch.int8)(weight).parts, CASES["fp8 channel"].config)
    with pytest.raises(CheckpointError, match=rf"Layer {NAME} lacks its weight_zero_p"):
        on_disk(packed(128)(weight).parts, CASES["packed asym"].config)


def test_what_contradicts_the_config_is_refused(on_disk: Any, weight: Tensor) -> None:
    form = StoredForm(scaled=False)
    (stored,) = on_disk(gptq(64, symmetric=False)(weight).parts, gptq_config(64))
    with pytest.raises(CheckpointError, match=r"has zero points, but .* \(sym\)"):
        kept(stored, form)
    (stored,) = on_disk(gptq(64, ordered=True)(weight).parts, gptq_config(64))
    for read in (lambda: kept(stored, form), lambda: stored.read_into(torch.empty(weight.shape))):
        with pytest.raises(CheckpointError, match=r"ordered \(g_idx\), but .* \(desc_act\)"):
            read()
    parts = gptq(64, ordered=True)(weight).parts
    parts["g_idx"][3] = 6
    (stored,) = on_disk(parts, gptq_config(64, desc_act=True))
    with pytest.raises(CheckpointError, match="names groups that are not there"):
        stored.read_into(torch.empty(weight.shape))


@pytest.mark.parametrize("name", ["gptq 128", "awq 32", "packed asym", "int8", "fp8 channel"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_is_refused(
    name: str, bad: float, on_disk: Any, weight: Tensor
) -> None:
    parts = CASES[name].write(weight).parts
    parts["scales" if "scales" in parts else "weight_scale"][1, 0] = bad
    (stored,) = on_disk(parts, CASES[name].config)
    with pytest.raises(CheckpointError, match="has a scale that is not finite"):
        kept(stored, StoredForm(scaled=name in IN_ROWS))
    with pytest.raises(CheckpointError, match="has a scale that is not finite"):
        stored.read_into(torch.empty(weight.shape))


def test_nan_in_e4m3_is_refused(on_disk: Any, weight: Tensor) -> None:
    parts = rows(E4M3)(weight).parts
    parts["weight"].view(torch.uint8)[5, 7] = 0xFF
    (stored,) = on_disk(parts, CASES["fp8 channel"].config)
    with pytest.raises(CheckpointError, match="has values that are NaN"):
        kept(stored, StoredForm(scaled=True))
    with pytest.raises(CheckpointError, match="has values that are NaN"):
        stored.read_into(torch.empty(weight.shape))


class Dense:
    def __init__(self, name: str, value: Tensor) -> None:
        self.name, self.value, self.shape = name, value, tuple(value.shape)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.value)


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 127), ("fp8", 448)])
def test_weights_are_rounded_as_they_are_loaded(
    quantization: str, limit: int, weight: Tensor
) -> None:
    tensor = Dense(f"{NAME}.weight", weight)
    found = kept(tensor, LoadTimeForm(quantization, packed=False))
    largest = weight.abs().amax(1, keepdim=True)
    if quantization == "int8":
        assert ((found - weight).abs() <= largest / limit * 0.5001).all()
        repeated = kept(tensor, LoadTimeForm("int8", packed=True))
        assert ((repeated - found).abs() <= largest * 2**-11).all()
    else:
        # Half a unit of 3 bits of mantissa, or of the smallest number below the normal ones.
        assert ((found - weight).abs() <= weight.abs() / 16 + largest / limit * 2**-10).all()


def test_embeddings_head_and_vectors_are_not_rounded(weight: Tensor) -> None:
    form = LoadTimeForm("fp8", packed=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert form.format_of(Dense(name, weight)) is None
    assert form.format_of(Dense("model.layers.0.input_layernorm.weight", weight[0])) is None
    assert form.format_of(Dense(f"{NAME}.weight", weight)) == ScaledFormat("e4m3")
    assert LoadTimeForm("fp8", packed=True).format_of(Dense(f"{NAME}.weight", weight)) is None
