"""ModernBERT (Warner et al., arXiv 2412.13663): a pre-norm encoder with rotary embedding, gated
MLPs, and layers that attend to a window. It knows layers and an EncoderConfig, no requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.layers.context import LayerContext
from headrace.layers.embedding import Embedding
from headrace.layers.layer_norm import AddLayerNorm
from headrace.layers.linear import Linear
from headrace.layers.rope import cos_sin_table
from headrace.layers.rope_parameters import RopeParameters
from headrace.layers.stored_rows import Rows
from headrace.layers.weights import WeightSlots, WeightTensor, read_weights
from headrace.models.bert import Renamed
from headrace.models.encoder_config import EncoderConfig
from headrace_kernels.kernel_set import KernelSet


class ModernLayer(nn.Module):
    """Attention, then MLP, each on the normalised residual stream."""

    def __init__(
        self, config: EncoderConfig, index: int, cos_sin: Tensor, context: LayerContext
    ) -> None:
        super().__init__()
        traits = config.modern
        assert traits is not None
        size, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.num_heads, self.activation = config.num_heads, config.activation
        self.inner, self.window, self.cos_sin = inner, traits.windows[index], cos_sin
        self.attn_norm: AddLayerNorm | None = None  # the first layer gets it normalised
        if index:
            self.attn_norm = AddLayerNorm(size, eps, context, bias=traits.norm_bias, keeps_sum=True)
        self.qkv = Linear(size, {"Wqkv": 3 * size}, bias=traits.attention_bias, context=context)
        self.out = Linear(size, {"Wo": size}, bias=traits.attention_bias, context=context)
        self.mlp_norm = AddLayerNorm(size, eps, context, bias=traits.norm_bias, keeps_sum=True)
        self.up = Linear(size, {"Wi": 2 * inner}, bias=traits.mlp_bias, context=context)
        self.down = Linear(inner, {"Wo": size}, bias=traits.mlp_bias, context=context)
        self._context = context

    def forward(self, x: Tensor, residual: Tensor, starts: Sequence[int]) -> Tensor:
        """x: [T, E] in the model dtype, what is still to be added to residual [T, E] fp32, or the
        first layer's input -> what this layer still has to add."""
        context, kernels = self._context, self._context.kernels
        if self.attn_norm is not None:
            x = self.attn_norm(x, residual)
        qkv = self.qkv(Rows(x))
        attended = context.activations("attended", *x.shape)
        scale = (x.shape[1] // self.num_heads) ** -0.5
        kernels.bidirectional_attention(
            qkv, starts, self.num_heads, scale, attended, self.window, self.cos_sin
        )
        up = self.up(Rows(self.mlp_norm(self.out(Rows(attended)), residual)))
        activated = context.activations("activated", len(up), self.inner)
        kernels.mlp_activation(up[:, : self.inner], starts, self.activation, activated)
        activated *= up[:, self.inner :]
        out: Tensor = self.down(Rows(activated))
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        slots = (
            self.qkv.weight_slots(f"{prefix}.attn")
            | self.out.weight_slots(f"{prefix}.attn")
            | self.mlp_norm.weight_slots(f"{prefix}.mlp_norm")
            | self.up.weight_slots(f"{prefix}.mlp")
            | self.down.weight_slots(f"{prefix}.mlp")
        )
        if self.attn_norm is not None:
            slots |= self.attn_norm.weight_slots(f"{prefix}.attn_norm")
        return slots


class ModernEncoder(nn.Module):
    """As bert.Encoder. Its parameters start uninitialized."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
        max_positions: int,
    ) -> None:
        super().__init__()
        traits = config.modern
        assert traits is not None
        self.config = config
        self.context = context = LayerContext(dtype=dtype, device=device, kernels=kernels)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.embedding = Embedding(config.vocab_size, size, context)
        self.norm = AddLayerNorm(size, eps, context, bias=traits.norm_bias)
        tables = {
            theta: cos_sin_table(_rope(theta, config), max_positions, device)
            for theta in set(traits.thetas)
        }
        self.layers = nn.ModuleList(
            ModernLayer(config, index, tables[theta], context)
            for index, theta in enumerate(traits.thetas)
        )
        self.final_norm = AddLayerNorm(size, eps, context, bias=traits.norm_bias)
        self.head: Linear | None = None
        if config.is_classifier:
            labels = len(config.labels)
            self.head = Linear(size, {"dense": size}, bias=traits.head_bias, context=context)
            self.head_norm = AddLayerNorm(size, eps, context, bias=traits.norm_bias)
            self.classifier = Linear(size, {"classifier": labels}, bias=True, context=context)

    def forward(
        self, token_ids: Tensor, positions: Tensor, token_types: Tensor, starts: Sequence[int]
    ) -> Tensor:
        """As bert.Encoder; neither positions nor token types are read."""
        residual: Tensor = self.embedding(token_ids)
        x = self.norm(None, residual)
        for layer in self.layers:
            x = layer(x, residual, starts)
        self.final_norm(x, residual)
        return residual

    def classify(self, hidden: Tensor) -> Tensor:
        """hidden: [N, E] fp32, what is judged of each request -> logits of labels [N, L] fp32."""
        assert self.head is not None and self.config.modern is not None, "it is no classifier"
        count = len(hidden)
        padding = -count % self.head.weight.row_multiple
        x = functional.pad(hidden, (0, 0, 0, padding)).to(self.context.dtype)
        inner = self.head(Rows(x))
        activated = torch.empty(inner.shape, dtype=torch.float32, device=inner.device)
        kind = self.config.modern.head_activation
        self.context.kernels.mlp_activation(inner, range(len(inner) + 1), kind, activated)
        logits: Tensor = self.classifier(Rows(self.head_norm(None, activated)))
        return logits[:count].float()

    def load_weights(self, tensors: Iterable[WeightTensor]) -> None:
        """Read all weights. Raises CheckpointError, naming the tensor, if one does not fit."""
        slots: WeightSlots = {"embeddings.tok_embeddings.weight": self.embedding.weight.slot()}
        slots |= self.norm.weight_slots("embeddings.norm")
        slots |= self.final_norm.weight_slots("final_norm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ModernLayer)
            slots |= layer.weight_slots(f"layers.{index}")
        if self.head is not None:
            slots |= self.head.weight_slots("head") | self.head_norm.weight_slots("head.norm")
            own = self.classifier.weight_slots("")
            slots |= {key.removeprefix("."): slot for key, slot in own.items()}
        read_weights(self._renamed(tensors), slots)

    def _renamed(self, tensors: Iterable[WeightTensor]) -> Iterator[WeightTensor]:
        """Without the prefix, and without the head of a masked language model."""
        for tensor in tensors:
            name = tensor.name.removeprefix(self.config.family.prefix)
            is_head = name.startswith(("head.", "classifier.", "decoder."))
            if self.head is not None or not is_head:
                yield Renamed(name, tensor)


def _rope(theta: float, config: EncoderConfig) -> RopeParameters:
    return RopeParameters(
        rope_theta=theta,
        rotary_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.max_position_embeddings,
    )
