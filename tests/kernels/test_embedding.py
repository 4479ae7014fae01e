from __future__ import annotations

import pytest
import torch

from headrace_kernels.ops.embedding import embedding
from headrace_kernels.testing import poisoned

pytestmark = pytest.mark.usefixtures("implementation")

EVERYWHERE = pytest.mark.parametrize(
    "implementation", ["reference", "triton", "scalar", "avx2", "avx512"], indirect=True
)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (0, 8), (5, 33), (10, 576), (2, 1300)])
def test_embedding(tokens: int, size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(97, size).to(dtype)
    token_ids = torch.randint(97, (tokens,))
    out = embedding(token_ids, weight, poisoned(tokens, size, dtype=torch.float32))
    assert torch.equal(out, weight[token_ids].float())


@EVERYWHERE
def test_rows_of_a_slice() -> None:
    weight = torch.randn(9, 40)[:, :24]
    assert torch.equal(embedding(torch.tensor([8, 0]), weight), weight[[8, 0]])


@pytest.mark.parametrize("token_id", [-1, 9, 2**40])
def test_ids_outside_of_the_table(token_id: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        embedding(torch.tensor([3, token_id]), torch.randn(9, 4))


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
def test_an_id_outside_of_the_table_is_a_row_of_nan() -> None:
    weight = torch.randn(9, 40)
    out = embedding(torch.tensor([8, -1, 0, 9, 2**40]), weight, poisoned(5, 40) + 1)
    assert torch.equal(out[[0, 2]], weight[[8, 0]])
    assert out[[1, 3, 4]].isnan().all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="token_ids must be int64"):
        embedding(torch.tensor([1], dtype=torch.int32), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"out must have shape \(1, 3\)"):
        embedding(torch.tensor([1]), torch.randn(2, 3), torch.empty(1, 4))
