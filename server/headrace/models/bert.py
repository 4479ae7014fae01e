"""BERT (Devlin et al., arXiv 1810.04805) and those of its shape: RoBERTa (1907.11692), XLM-R
(1911.02116), DistilBERT (1910.01108). From token ids to hidden states, and to labels.

It knows layers and an EncoderConfig; it knows nothing of requests, files or pooling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.layers.context import LayerContext
from headrace.layers.embedding import Embedding
from headrace.layers.layer_norm import AddLayerNorm
from headrace.layers.linear import Linear
from headrace.layers.stored_rows import Rows
from headrace.layers.weights import WeightSlots, WeightTensor, read_weights
from headrace.models.encoder_config import EncoderConfig
from headrace_kernels.kernel_set import KernelSet


class EncoderLayer(nn.Module):
    """Attention, then MLP, each normalised behind the residual add."""

    def __init__(self, config: EncoderConfig, context: LayerContext) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads, self.activation = config.num_heads, config.activation
        self.qkv = Linear(
            size, {"query": size, "key": size, "value": size}, bias=True, context=context
        )
        self.attention_out = Linear(size, {"dense": size}, bias=True, context=context)
        self.attention_norm = AddLayerNorm(size, eps, context)
        self.up = Linear(size, {"dense": config.intermediate_size}, bias=True, context=context)
        self.down = Linear(config.intermediate_size, {"dense": size}, bias=True, context=context)
        self.norm = AddLayerNorm(size, eps, context)
        self._context = context

    def forward(self, x: Tensor, residual: Tensor, starts: Sequence[int]) -> Tensor:
        """x: [T, E] in the model dtype, residual: the same in fp32 -> both behind the layer."""
        context, kernels = self._context, self._context.kernels
        qkv = self.qkv(Rows(x))
        attended = context.activations("attended", *x.shape)
        scale = (x.shape[1] // self.num_heads) ** -0.5
        kernels.bidirectional_attention(qkv, starts, self.num_heads, scale, attended)
        x = self.attention_norm(self.attention_out(Rows(attended)), residual)
        up = self.up(Rows(x))
        activated = context.activations("activated", *up.shape)
        kernels.mlp_activation(up, starts, self.activation, activated)
        out: Tensor = self.norm(self.down(Rows(activated)), residual)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return (
            self.qkv.weight_slots(f"{prefix}.attention.self")
            | self.attention_out.weight_slots(f"{prefix}.attention.output")
            | self.attention_norm.weight_slots(f"{prefix}.attention.output.LayerNorm")
            | self.up.weight_slots(f"{prefix}.intermediate")
            | self.down.weight_slots(f"{prefix}.output")
            | self.norm.weight_slots(f"{prefix}.output.LayerNorm")
        )


class Encoder(nn.Module):
    """Its parameters start uninitialized."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context = LayerContext(dtype=dtype, device=device, kernels=kernels)
        size = config.hidden_size
        self.embedding = Embedding(config.vocab_size, size, context)
        self.positions = context.parameter(config.num_positions, size, dtype=torch.float32)
        self.token_types: nn.Parameter | None = None
        if config.num_token_types:
            self.token_types = context.parameter(config.num_token_types, size, dtype=torch.float32)
        self.norm = AddLayerNorm(size, config.layer_norm_eps, context)
        self.layers = nn.ModuleList(EncoderLayer(config, context) for _ in range(config.num_layers))
        self.head_dense: Linear | None = None
        self.head_out: Linear | None = None
        if config.is_classifier:
            dense, out = (name.rpartition(".")[2] for name in config.family.head)
            labels = len(config.labels)
            self.head_dense = Linear(size, {dense: size}, bias=True, context=context)
            self.head_out = Linear(size, {out: labels}, bias=True, context=context)

    def forward(
        self, token_ids: Tensor, positions: Tensor, token_types: Tensor, starts: Sequence[int]
    ) -> Tensor:
        """Hidden states, [T, E] fp32, in memory that the next call overwrites.

        Args:
            token_ids: [T] int64, the requests' tokens one after another, then padding: T is a
                multiple of what the products need for rows that do not depend on T.
            positions: [T] int64, each token's position in its request; 0 for padding.
            token_types: [T] int64: 1 in the second text of a pair, where the model tells; else 0.
            starts: where each request begins, and the last one ends.
        """
        residual: Tensor = self.embedding(token_ids)
        residual += self.positions[positions + self.config.first_position]
        if self.token_types is not None:
            residual += self.token_types[token_types]
        x = self.norm(None, residual)
        for layer in self.layers:
            x = layer(x, residual, starts)
        return residual

    def classify(self, hidden: Tensor) -> Tensor:
        """hidden: [N, E] fp32, the first token of each request -> logits of labels [N, L] fp32."""
        assert self.head_dense is not None and self.head_out is not None, "it is no classifier"
        count = len(hidden)
        padding = -count % self.head_dense.weight.row_multiple
        x = functional.pad(hidden, (0, 0, 0, padding)).to(self.context.dtype)
        inner = self.head_dense(Rows(x))
        relu = self.config.family.head_activation == "relu"
        # A row at a time: what torch makes of a value depends on where it stands among all.
        rows = [row.float().relu() if relu else row.float().tanh() for row in inner]
        logits: Tensor = self.head_out(Rows(torch.stack(rows).to(self.context.dtype)))
        return logits[:count].float()

    def load_weights(self, tensors: Iterable[WeightTensor]) -> None:
        """Read all weights. Raises CheckpointError, naming the tensor, if one does not fit."""
        slots: WeightSlots = {
            "embeddings.word_embeddings.weight": self.embedding.weight.slot(),
            "embeddings.position_embeddings.weight": self.positions,
        }
        if self.token_types is not None:
            slots["embeddings.token_type_embeddings.weight"] = self.token_types
        slots |= self.norm.weight_slots("embeddings.LayerNorm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            slots |= layer.weight_slots(f"encoder.layer.{index}")
        for part, name in zip(
            (self.head_dense, self.head_out), self.config.family.head, strict=True
        ):
            if part is not None:
                own = part.weight_slots(name.rpartition(".")[0])
                slots |= {key.removeprefix("."): slot for key, slot in own.items()}
        read_weights(self._renamed(tensors), slots)

    def _renamed(self, tensors: Iterable[WeightTensor]) -> Iterator[WeightTensor]:
        """Under BERT's names; without what only training or other heads need."""
        family, is_classifier = self.config.family, self.config.is_classifier
        for tensor in tensors:
            name = tensor.name.removeprefix(family.prefix)
            for theirs, ours in family.renamed:
                name = name.replace(theirs, ours)
            is_head = name.startswith(family.head)
            if is_head and not is_classifier:
                continue
            is_ours = name.startswith(("embeddings.", "encoder.")) or is_head
            if is_ours and not name.endswith(("position_ids", "embeddings.token_type_ids")):
                yield Renamed(name, tensor)


@dataclass(frozen=True, slots=True)
class Renamed:
    """A WeightTensor under another name."""

    name: str
    tensor: WeightTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read_into(self, out: Tensor) -> None:
        self.tensor.read_into(out)
