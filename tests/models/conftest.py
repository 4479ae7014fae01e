"""Tiny random checkpoints, and a model with a paged cache of its own to run them through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.models.base import build_model
from headrace.models.config import ModelConfig
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.dispatch import KernelFacts, choose

PAGE_SIZE = 16
NUM_BLOCKS = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint in memory."""

    name: str
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.value)


def stored(state: Mapping[str, Tensor]) -> list[StoredTensor]:
    return [StoredTensor(name, value) for name, value in state.items()]


class PagedModel:
    """A CausalLM and a cache of shuffled blocks that starts full of NaN."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[Any],
        *,
        dtype: torch.dtype = torch.float32,
        max_positions: int | None = None,
        method: Any = None,
        kernels: Mapping[str, str] | None = None,
        activation_bits: int = 8,
    ) -> None:
        facts = KernelFacts(
            device="cpu",
            arch="any",
            dtype=dtype,
            head_dim=config.head_dim,
            page_size=PAGE_SIZE,
        )
        self.model = build_model(
            config,
            dtype=dtype,
            device="cpu",
            kernels=choose(facts, kernels),
            max_positions=max_positions,
            activation_bits=activation_bits,
        )
        for parameter in self.model.parameters():
            parameter.fill_(float("nan"))
        self.model.load_weights(weights, method)
        shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=dtype)
        self.free = list(np.random.permutation(NUM_BLOCKS))
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, parts: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The next tokens of each request -> their logits [tokens, V]."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for request, tokens in parts.items():
            first = self.lengths.get(request, 0)
            last = self.lengths[request] = first + len(tokens)
            blocks = self.blocks.setdefault(request, [])
            while len(blocks) * PAGE_SIZE < last:
                blocks.append(self.free.pop())
            token_ids += tokens
            new = range(first, last)
            positions += new
            slots += [blocks[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in new]
        padding = -len(token_ids) % 8
        widest = max(len(self.blocks[request]) for request in parts)
        metadata = AttentionMetadata.build(
            np.array([len(tokens) for tokens in parts.values()]),
            np.array([self.lengths[request] for request in parts]),
            np.array([self.blocks[r] + [-1] * (widest - len(self.blocks[r])) for r in parts]),
            np.array(slots + [-1] * padding),
            "cpu",
        )
        hidden = self.model(
            torch.tensor(token_ids + [0] * padding),
            torch.tensor(positions + [0] * padding),
            [self.cache[:, layer] for layer in range(self.model.config.num_layers)],
            metadata,
        )
        logits = self.model.compute_logits(hidden[: len(token_ids)])
        assert logits.dtype == torch.float32
        by_request = torch.split(logits, [len(tokens) for tokens in parts.values()])
        return dict(zip(parts, by_request, strict=True))

    def forget(self, request: str) -> None:
        """Give the request's blocks back, with NaN in them."""
        for block in self.blocks.pop(request):
            self.cache[block] = float("nan")
            self.free.append(block)
        del self.lengths[request]

    def chunked(self, tokens: Sequence[int], chunk: int, request: str = "chunked") -> Tensor:
        """All logits of a request that is computed `chunk` tokens at a time."""
        parts = [
            self.step({request: tokens[i : i + chunk]})[request]
            for i in range(0, len(tokens), chunk)
        ]
        self.forget(request)
        return torch.cat(parts)


@pytest.fixture(scope="session")
def paged_model() -> type[PagedModel]:
    return PagedModel


@pytest.fixture(scope="session")
def as_weights() -> Callable[[Mapping[str, Tensor]], list[StoredTensor]]:
    return stored


TINY = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny_hf_model() -> Callable[..., Any]:
    """(family, options) -> a transformers model, random in every parameter."""
    import transformers

    def make(family: str, **options: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif name.endswith("bias"):
                    parameter.normal_()
        return model

    return make


@pytest.fixture(scope="session")
def hf_config() -> Callable[[Any], dict[str, Any]]:
    """The config.json that a transformers model is saved with."""

    def config(model: Any) -> dict[str, Any]:
        return {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}

    return config
