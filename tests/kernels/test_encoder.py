from __future__ import annotations

import pytest
import torch

from headrace_kernels.ops.encoder import add_layer_norm, bidirectional_attention, mlp_activation
from headrace_kernels.testing import poisoned

STARTS = [0, 1, 38, 38, 55]


def double_attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = qkv.double().unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_stays_within_requests(dtype: torch.dtype, error: float) -> None:
    qkv = torch.randn(64, 3 * 4 * 12).to(dtype)
    out = bidirectional_attention(qkv, STARTS, 4, out=poisoned(64, 48, dtype=dtype))
    for begin, end in zip(STARTS[:-1], STARTS[1:], strict=True):
        expected = double_attention(qkv[begin:end], 4)
        assert torch.allclose(out[begin:end].double(), expected, atol=error)
        alone = bidirectional_attention(qkv[begin:end], [0, end - begin], 4)
        assert torch.equal(alone, out[begin:end])
    assert out[55:].isnan().all(), "padding was written"


def test_rotated_attention_within_a_window() -> None:
    heads, size = 2, 8
    qkv, angles = torch.randn(55, 3 * heads * size), torch.rand(40, size // 2)
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    out = bidirectional_attention(qkv, STARTS, heads, window=3, cos_sin=cos_sin)
    for begin, end in zip(STARTS[:-1], STARTS[1:], strict=True):
        q, k, v = qkv[begin:end].double().unflatten(1, (3, heads, size)).unbind(1)
        turn = torch.polar(
            torch.ones(end - begin, 1, size // 2).double(), angles[: end - begin, None].double()
        )
        q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
        products = torch.einsum("ihd,jhd->hij", q, k.conj()).real * size**-0.5
        place = torch.arange(end - begin)
        products[:, (place[:, None] - place).abs() > 3] = -torch.inf
        expected = torch.einsum("hij,jhd->ihd", products.softmax(-1), v).flatten(1)
        assert torch.allclose(out[begin:end].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu"])
def test_activations(kind: str) -> None:
    x = 3 * torch.randn(64, 37)
    out = mlp_activation(x, STARTS, kind, poisoned(64, 37, dtype=torch.float32))
    wide = x[:55].double()
    cubic = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    exact = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
    expected = {"gelu": exact, "gelu_tanh": cubic, "relu": wide.clamp(min=0)}[kind]
    assert torch.allclose(out[:55].double(), expected, atol=1e-6)
    for begin, end in zip(STARTS[:-1], STARTS[1:], strict=True):
        assert torch.equal(mlp_activation(x[begin:end], [0, end - begin], kind), out[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_sum(dtype: torch.dtype) -> None:
    x, residual = torch.randn(9, 40).to(dtype), torch.randn(9, 40)
    weight, bias = torch.randn(40), torch.randn(40)
    total = x.double() + residual.double()
    spread = (total.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (total - total.mean(-1, keepdim=True)) / spread * weight + bias
    out = add_layer_norm(x, residual, weight, bias, 1e-5, poisoned(9, 40, dtype=dtype))
    assert torch.allclose(residual.double(), expected, atol=1e-5)
    assert torch.equal(out, residual.to(dtype))
    summed, kept = x + residual, residual.clone()
    if dtype == torch.float32:
        normalised = add_layer_norm(x, kept, weight, None, 1e-5, keeps_sum=True)
        assert torch.equal(kept, summed)
        assert torch.equal(normalised, add_layer_norm(None, summed, weight, None, 1e-5))
    again = residual.clone()
    add_layer_norm(None, again, torch.ones(40), torch.zeros(40), 1e-5)
    assert again.mean().abs() < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(8, 12)
    with pytest.raises(ValueError, match="kind must be one of gelu, gelu_tanh, relu, got 'silu'"):
        mlp_activation(x, [0, 8], "silu")
    for starts in ([], [0, 9], [4, 2], [-1, 4]):
        with pytest.raises(ValueError, match="ascending row numbers of 8 rows"):
            mlp_activation(x, starts)
    with pytest.raises(ValueError, match="3 \\* 5 heads"):
        bidirectional_attention(x, [0, 8], 5)
    with pytest.raises(ValueError, match="weight must have shape"):
        add_layer_norm(None, x, torch.ones(11), torch.ones(12), 1e-5)
