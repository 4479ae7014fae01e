"""KernelSet: the ops a model was given, one callable each, chosen once when the model is loaded.

The signatures here are the contract of every candidate; ops/<stem>.py says what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.packed_format import PackedFormat


class RmsNorm(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        out_scale: Tensor | None = None,
    ) -> None: ...


class AddRmsNorm(Protocol):
    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        out_scale: Tensor | None = None,
    ) -> None: ...


class RopeAndWriteKv(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        q_out: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None: ...


class SiluAndMul(Protocol):
    def __call__(self, gate_up: Tensor, out: Tensor, out_scale: Tensor | None = None) -> None: ...


class PagedAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        out: Tensor,
    ) -> None: ...


class LinearOp(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None: ...


class QuantizeRows(Protocol):
    def __call__(self, x: Tensor, out: Tensor, scale: Tensor) -> None: ...


class ScaledLinear(Protocol):
    def __call__(
        self,
        x: Tensor,
        x_scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out: Tensor,
    ) -> None: ...


class QuantizedLinear(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        fmt: PackedFormat,
        activation_bits: int,
        bias: Tensor | None,
        out: Tensor,
    ) -> None: ...


class Embedding(Protocol):
    def __call__(self, token_ids: Tensor, weight: Tensor, out: Tensor) -> None: ...


class QuantizedEmbedding(Protocol):
    def __call__(
        self, token_ids: Tensor, weight: Tensor, fmt: PackedFormat, out: Tensor
    ) -> None: ...


class SampleTokens(Protocol):
    def __call__(
        self,
        logits: Tensor,
        *,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        out: Tensor,
    ) -> None: ...


class TokenLogprobs(Protocol):
    def __call__(
        self,
        logits: Tensor,
        token_ids: Tensor,
        logprobs: Tensor,
        top_ids: Tensor,
        top_logprobs: Tensor,
    ) -> None: ...


class CopyBlocks(Protocol):
    def __call__(self, src: Tensor, dst: Tensor, pairs: Tensor) -> None: ...


class Put(Protocol):
    def __call__(self, index: Tensor, values: Tensor, out: Tensor) -> None: ...


class TokenInputs(Protocol):
    def __call__(
        self,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        tokens: Tensor,
        last_tokens: Tensor,
        block_table: Tensor,
        page_size: int,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
    ) -> None: ...


class SamplingInputs(Protocol):
    def __call__(
        self,
        rows: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        words: Tensor,
        logit_indices: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> None: ...


class AddLayerNorm(Protocol):
    def __call__(
        self,
        x: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out: Tensor,
        keeps_sum: bool = False,
    ) -> None: ...


class MlpActivation(Protocol):
    def __call__(self, x: Tensor, starts: Sequence[int], kind: str, out: Tensor) -> None: ...


class BidirectionalAttention(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        starts: Sequence[int],
        num_heads: int,
        scale: float,
        out: Tensor,
        window: int | None = None,
        cos_sin: Tensor | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class KernelSet:
    """One implementation of every op. All write into their last arguments and return nothing."""

    embedding: Embedding
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rope_and_write_kv: RopeAndWriteKv
    silu_and_mul: SiluAndMul
    paged_attention: PagedAttention
    linear: LinearOp
    quantize_rows: QuantizeRows
    scaled_linear: ScaledLinear
    quantized_linear: QuantizedLinear
    quantized_embedding: QuantizedEmbedding
    sample_tokens: SampleTokens
    token_logprobs: TokenLogprobs
    copy_blocks: CopyBlocks
    put: Put
    token_inputs: TokenInputs
    sampling_inputs: SamplingInputs
    add_layer_norm: AddLayerNorm
    mlp_activation: MlpActivation
    bidirectional_attention: BidirectionalAttention
    names: tuple[tuple[str, str], ...]
    """(stem, candidate) of what was chosen, for logs."""
    batch_invariant: bool
    """Whether a row's result depends on that row only, to the bit."""
