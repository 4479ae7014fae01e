"""Norm and MLP write their outputs in the form that the product behind them takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.layers.context import LayerContext
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import RMSNorm
from headrace.layers.stored_rows import DTYPES, Rows, quantized
from headrace.quantization.load_time import LoadTimeForm
from headrace.quantization.method import ScaledFormat
from headrace_kernels.dispatch import KernelFacts, choose

TOKENS, WIDTH, INNER = 5, 128, 256
FORMATS = [ScaledFormat("int8"), ScaledFormat("e4m3"), ScaledFormat("int8", of_blocks=True)]


@pytest.fixture
def context() -> LayerContext:
    facts = KernelFacts(device="cpu", arch="", dtype=torch.float32, head_dim=64, page_size=16)
    return LayerContext(dtype=torch.float32, device=torch.device("cpu"), kernels=choose(facts))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_writes_8_bit_rows(fmt: ScaledFormat, adds: bool, context: LayerContext) -> None:
    norm = RMSNorm(INNER, 1e-5, context=context)
    norm.weight.copy_(torch.rand(INNER))
    residual, x = torch.randn(TOKENS, INNER), torch.randn(TOKENS, INNER) if adds else None
    as_floats = norm(x, residual.clone()).values.clone()
    rows = norm(x, residual, fmt)
    expected = quantized(as_floats, fmt, context)
    assert rows.values.dtype == DTYPES[fmt.dtype]
    assert rows.scale is not None and expected.scale is not None
    assert rows.scale.shape == (TOKENS, 2 if fmt.of_blocks else 1)
    assert torch.equal(rows.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(rows.scale, expected.scale)


class Dense:
    def __init__(self, name: str, value: Tensor) -> None:
        self.name, self.value, self.shape = name, value, tuple(value.shape)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.value)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_an_mlp_quantizes_between_its_products(
    quantization: str, context: LayerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = GatedMLP(WIDTH, INNER, bias=False, context=context)
    method = LoadTimeForm(quantization, packed=False)
    prefix = "model.layers.0.mlp"
    slots: dict[str, Any] = mlp.weight_slots(prefix)
    for name, slot in slots.items():
        slot.read(Dense(name, torch.randn(slot.shape) / 8), method)
    x = torch.randn(TOKENS, WIDTH)
    expected = mlp(Rows(x)).clone()
    # The product of these is what it is when it quantizes them itself.
    rows = quantized(x, ScaledFormat(mlp.input_format.dtype), context)
    assert mlp.input_format == mlp.down_proj.weight.input_format
    refuse: Callable[..., None] = lambda *_: pytest.fail("was 8 bits already")  # noqa: E731
    monkeypatch.setattr("headrace.layers.stored_rows.quantized", refuse)
    assert torch.equal(mlp(rows), expected)
