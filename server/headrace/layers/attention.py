"""Self-attention over the paged KV cache: projections, QK-norm, RoPE, cache write, attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.linear import Linear
from headrace.layers.stored_rows import Rows
from headrace.layers.weights import WeightSlots
from headrace.quantization.method import Format
from headrace_kernels.attention_metadata import AttentionMetadata


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), causal, optionally within a sliding window.

    `cos_sin` is the table [max_positions, 2, rot / 2] of layers/rope.py, shared by the layers; rot
    is 0 in a layer without rotary embedding.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
        sliding_window: int | None,
        cos_sin: Tensor,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        self.cos_sin = cos_sin
        self.qkv_proj = Linear(
            hidden_size,
            {
                "q_proj": num_heads * head_dim,
                "k_proj": num_kv_heads * head_dim,
                "v_proj": num_kv_heads * head_dim,
            },
            bias=qkv_bias,
            context=context,
        )
        self.o_proj = Linear(
            num_heads * head_dim,
            {"o_proj": hidden_size},
            bias=o_bias,
            context=context,
        )
        self.qk_norm_eps = qk_norm_eps or 0.0
        self.q_norm: nn.Parameter | None = None
        self.k_norm: nn.Parameter | None = None
        if qk_norm_eps is not None:
            self.q_norm = context.parameter(head_dim, dtype=torch.float32)
            self.k_norm = context.parameter(head_dim, dtype=torch.float32)
        self._context = context

    @property
    def input_format(self) -> Format | None:
        return self.qkv_proj.weight.input_format

    def forward(
        self, x: Rows, positions: Tensor, kv_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """x: [T, E], in the model dtype or as input_format; positions: [T] int64; kv_cache: as
        ops.rope has it, written here -> [T, E]."""
        qkv = self.qkv_proj(x)
        context, shape = self._context, (len(qkv), self.num_heads, self.head_dim)
        q = context.activations("q", *shape)
        context.kernels.rope_and_write_kv(
            qkv,
            positions,
            self.cos_sin,
            kv_cache,
            metadata.slot_mapping,
            q,
            self.q_norm,
            self.k_norm,
            self.qk_norm_eps,
        )
        attended = context.activations("attended", *shape)
        context.kernels.paged_attention(
            q, kv_cache, metadata, self.head_dim**-0.5, self.sliding_window, None, attended
        )
        out: Tensor = self.o_proj(Rows(attended.view(len(qkv), -1)))
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        slots = self.qkv_proj.weight_slots(prefix) | self.o_proj.weight_slots(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            slots[f"{prefix}.q_norm.weight"] = self.q_norm
            slots[f"{prefix}.k_norm.weight"] = self.k_norm
        return slots
