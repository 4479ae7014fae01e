"""CausalLM: the decoder that all families share, from token ids to logits, and its weights.

It knows layers and a ModelConfig; it knows nothing of requests, files or sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError
from headrace.layers.attention import Attention
from headrace.layers.context import LayerContext
from headrace.layers.embedding import Embedding, logits
from headrace.layers.matrix import Matrix
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import RMSNorm
from headrace.layers.rope import cos_sin_table, no_rope_table
from headrace.layers.weights import WeightSlots, WeightTensor, read_weights
from headrace.models.config import ModelConfig
from headrace.quantization.method import QuantMethod
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kernel_set import KernelSet

HEAD = "lm_head.weight"


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on the normalised residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        cos_sin: Tensor,
        context: LayerContext,
    ) -> None:
        super().__init__()
        traits, size, eps = config.traits, config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(size, eps, context=context)
        self.attention = Attention(
            size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=traits.qkv_bias,
            o_bias=traits.o_bias,
            qk_norm_eps=eps if traits.qk_norm else None,
            sliding_window=traits.windows[layer],
            cos_sin=cos_sin,
            context=context,
        )
        self.post_attention_norm = RMSNorm(size, eps, context=context)
        self.mlp = GatedMLP(
            size,
            config.intermediate_size,
            bias=traits.mlp_bias,
            context=context,
        )

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        kv_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """x: [T, E], what the layer before still has to add to residual [T, E] fp32 -> the same."""
        normalised = self.input_norm(x, residual, self.attention.input_format)
        attended = self.attention(normalised, positions, kv_cache, metadata)
        out: Tensor = self.mlp(self.post_attention_norm(attended, residual, self.mlp.input_format))
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return (
            self.input_norm.weight_slots(f"{prefix}.input_layernorm")
            | self.attention.weight_slots(f"{prefix}.self_attn")
            | self.post_attention_norm.weight_slots(f"{prefix}.post_attention_layernorm")
            | self.mlp.weight_slots(f"{prefix}.mlp")
        )


class CausalLM(nn.Module):
    """A decoder-only language model over a paged KV cache. Its parameters start uninitialized."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
        max_positions: int,
        activation_bits: int = 8,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context = LayerContext(
            dtype=dtype, device=device, kernels=kernels, activation_bits=activation_bits
        )
        self.embedding = Embedding(config.vocab_size, config.hidden_size, context)
        rope = cos_sin_table(config.rope, max_positions, device)
        no_rope = no_rope_table(max_positions, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, rope if has_rope else no_rope, context)
            for layer, has_rope in enumerate(config.traits.rope_layers)
        )
        self.norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, context=context, out_dtype=torch.float32
        )
        self.head = self.embedding.weight
        if not config.tie_word_embeddings:
            self.head = Matrix(config.vocab_size, config.hidden_size, context)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Hidden states behind the final norm, [T, E] fp32; K and V are written into the caches.

        Args:
            token_ids: [T] int64, the requests' tokens one after another, then padding. A row's bits
                depend on that row only if T is a multiple of 8.
            positions: [T] int64, each token's position in its request; 0 for padding.
            kv_caches: for each layer [B, 2, K, P, D], of any strides between pages.
            metadata: where each request's tokens are, in the batch and in the caches.
        """
        residual = self.embedding(token_ids)
        x: Tensor | None = None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, residual, positions, kv_cache, metadata)
        hidden: Tensor = self.norm(x, residual).values
        return hidden

    def compute_logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor:
        """hidden: [N, E] rows of what `forward` returned, any N -> [N, V] fp32.

        A row's bits do not depend on N. With `reuse` the next call overwrites the result.
        """
        return logits(hidden, self.head, self.context if reuse else None)

    def load_weights(
        self, tensors: Iterable[WeightTensor], method: QuantMethod | None = None
    ) -> None:
        """Read all weights, in the forms that `method` says; without one all are dense.

        Raises CheckpointError, naming the tensor, if one does not fit.
        """
        slots: WeightSlots = {"model.embed_tokens.weight": self.embedding.weight.slot()}
        slots |= self.norm.weight_slots("model.norm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            slots |= layer.weight_slots(f"model.layers.{index}")
        # Rotary frequencies, which old checkpoints store, are computed from the config.
        ignored = {
            f"model.layers.{index}.self_attn.rotary_emb.inv_freq"
            for index in range(len(self.layers))
        }
        tied = self.config.tie_word_embeddings
        if tied:
            ignored.add(HEAD)
        else:
            slots[HEAD] = self.head.slot()
        read = read_weights(
            tensors,
            slots,
            method=method,
            optional=(HEAD,) if tied is None else (),
            ignored=ignored,
        )
        if tied is None and HEAD not in read:
            self.head = self.embedding.weight
        if self.head.dense is not None:
            self.norm.out_dtype = self.head.dense.dtype


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    kernels: KernelSet,
    max_positions: int | None = None,
    activation_bits: int = 8,
) -> CausalLM:
    """The model of a config, without its weights yet.

    `max_positions` is the longest request to be served: at most what the model was made for, which
    is the default. Raises CheckpointError if it is more. `activation_bits` are those of the inputs
    of packed weights: see ops/quantized_linear.py.
    """
    limit = config.max_position_embeddings
    if max_positions is not None and max_positions > limit:
        raise CheckpointError(
            f"The model knows {limit} positions, {max_positions} were asked for. "
            "Lower --max-model-len."
        )
    return CausalLM(
        config,
        dtype=dtype,
        device=torch.device(device),
        kernels=kernels,
        max_positions=max_positions or limit,
        activation_bits=activation_bits,
    )
