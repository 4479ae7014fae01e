"""What a model takes on this machine, worked out from file headers. Loads no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.config import EngineConfig
from headrace.engine.hardware import probe
from headrace.engine.resolution import DTYPE_BYTES, Hardware, ModelFacts, ResolvedConfig, resolve
from headrace.errors import CheckpointError, ConfigError
from headrace.loading.checkpoint import Checkpoint, open_checkpoint
from headrace.loading.gguf_weights import GGUFTensor
from headrace.loading.safetensors import SafetensorsTensor
from headrace.models.config import ModelConfig
from headrace.models.encoder_config import EncoderConfig, is_encoder
from headrace.models.pooling_config import PoolingConfig
from headrace.quantization.gguf_formats import DENSE_TYPES, packed_format, why_not_packed
from headrace.quantization.method import Format
from headrace.quantization.scheme import load_time_format
from headrace.quantization.stored_weight import QuantizedWeight, joined


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before weights are read."""

    checkpoint: Checkpoint
    model: ModelConfig | EncoderConfig
    hardware: Hardware
    resolved: ResolvedConfig
    pooling: PoolingConfig

    def weights(self) -> Iterator[StoredWeight]:
        """Those of the checkpoint, the tensors of quantized layers joined."""
        if isinstance(self.model, EncoderConfig):  # whose buffers of integers are not read
            return self.checkpoint.weights()
        return stored_weights(self.checkpoint, self.model)


StoredWeight = GGUFTensor | SafetensorsTensor | QuantizedWeight


def stored_weights(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[StoredWeight]:
    """Every weight. Raises CheckpointError for a quantized layer that lacks one of its tensors."""
    stored: Iterable[StoredWeight] = checkpoint.weights()
    if model.quantization is not None:
        parts = (tensor for tensor in checkpoint.weights() if isinstance(tensor, SafetensorsTensor))
        stored = joined(parts, model.quantization)
    for tensor in stored:
        if isinstance(tensor, SafetensorsTensor) and not tensor.is_readable:
            raise CheckpointError(
                f"Tensor {tensor.name} is stored as {tensor.dtype}, but the quantization_config of "
                "config.json does not say how. Use another copy of the checkpoint, or the "
                "unquantized one."
            )
        yield tensor


def make_plan(config: EngineConfig, hardware: Hardware | None = None) -> Plan:
    """Open the checkpoint that `config.model` (a local path) names and resolve every option, for
    this machine or for `hardware`.

    Raises CheckpointError or ConfigError, with a remedy, for what cannot be run here.
    """
    checkpoint = open_checkpoint(Path(config.model))
    if hardware is None:
        hardware = probe(config.device.device, deterministic=config.device.deterministic)
    if checkpoint.hf_config is not None and is_encoder(checkpoint.hf_config):
        return _encoder_plan(config, checkpoint, hardware)
    model = model_config(checkpoint)
    pooling = PoolingConfig.of(
        checkpoint.modules,
        checkpoint.hf_config,
        is_encoder=False,
        chosen=config.model_options.pooling,
    )
    rounded = config.model_options.quantization
    if rounded != "auto":
        _check_unquantized(checkpoint, model, rounded)
    packed_parameters, packed_bytes = _sizes(checkpoint, model, rounded, "packed")
    _, exact_bytes = _sizes(checkpoint, model, rounded, "exact")
    scaled_parameters, scaled_bytes = _sizes(checkpoint, model, rounded, "scaled")
    facts = ModelFacts(
        name=checkpoint.path.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        max_position_embeddings=model.max_position_embeddings,
        kv_elements_per_token=model.kv_elements_per_token,
        kv_rows_per_token=model.kv_rows_per_token,
        checkpoint_dtype=model.checkpoint_dtype,
        vocab_size=model.vocab_size,
        activation_bytes_per_token={
            dtype: _activation_bytes(model, size) for dtype, size in DTYPE_BYTES.items()
        },
        packed_parameters=packed_parameters,
        packed_bytes=packed_bytes,
        exact_bytes=exact_bytes,
        scaled_parameters=scaled_parameters,
        scaled_bytes=scaled_bytes,
        dtype_dequantizes=checkpoint.kind == "gguf",
    )
    return Plan(checkpoint, model, hardware, resolve(config, hardware, facts), pooling)


def _encoder_plan(config: EngineConfig, checkpoint: Checkpoint, hardware: Hardware) -> Plan:
    assert checkpoint.hf_config is not None
    model = EncoderConfig.from_hf(checkpoint.hf_config)
    if (rounded := config.model_options.quantization) != "auto":
        raise ConfigError(
            f"--quantization {rounded}: encoders are not quantized, {model.architecture} is one. "
            "Leave it out."
        )
    pooling = PoolingConfig.of(
        checkpoint.modules,
        checkpoint.hf_config,
        is_encoder=True,
        chosen=config.model_options.pooling,
    )
    facts = ModelFacts(
        name=checkpoint.path.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        max_position_embeddings=model.max_position_embeddings,
        kv_elements_per_token=0,
        kv_rows_per_token=0,
        checkpoint_dtype=model.checkpoint_dtype,
        vocab_size=len(model.labels),
        activation_bytes_per_token={
            # residual in fp32; x, qkv, attended and its product; up, activated
            dtype: 4 * model.hidden_size
            + (7 * model.hidden_size + 2 * model.intermediate_size) * size
            for dtype, size in DTYPE_BYTES.items()
        },
        trained_length=pooling.max_tokens,
        dtype_dequantizes=False,
    )
    return Plan(checkpoint, model, hardware, resolve(config, hardware, facts), pooling)


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture as the checkpoint's own configuration describes it."""
    if checkpoint.gguf_metadata is not None:
        return ModelConfig.from_gguf(checkpoint.gguf_metadata, checkpoint.rope_frequency_factors)
    assert checkpoint.hf_config is not None, "a folder without config.json is refused when opened"
    return ModelConfig.from_hf(checkpoint.hf_config, checkpoint.generation_config)


def _activation_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    """What LayerContext.activations holds of a token, for all layers, which share it."""
    size, attended = model.hidden_size, model.num_heads * model.head_dim
    qkv = attended + 2 * model.num_kv_heads * model.head_dim
    residual = 4 * size  # fp32
    rest = 3 * size + qkv + 2 * attended + 3 * model.intermediate_size
    return residual + rest * dtype_bytes


def _check_unquantized(checkpoint: Checkpoint, model: ModelConfig, rounded: str) -> None:
    stored = model.quantization.label if model.quantization is not None else ""
    for tensor in checkpoint.weights():
        if isinstance(tensor, GGUFTensor) and tensor.quantization not in DENSE_TYPES:
            stored = tensor.quantization
    if stored:
        raise ConfigError(
            f"--quantization {rounded}: the weights are quantized already ({stored}). Leave it "
            "out, or use the unquantized checkpoint."
        )


def _format(tensor: StoredWeight, rounded: str, weights: str) -> Format | None:
    """In which a weight is kept if ResolvedConfig.weights is `weights`; None: it is not."""
    if rounded != "auto":
        return load_time_format(rounded, tensor.name, tensor.shape, packed=weights != "scaled")
    exact = weights == "exact"
    if isinstance(tensor, GGUFTensor) and weights != "scaled":
        return packed_format(tensor.quantization, tensor.shape, exact_scales=exact)
    if isinstance(tensor, QuantizedWeight):
        if weights == "scaled":
            return tensor.scheme.scaled_format(tensor.shape)
        fp16 = tensor.scales_are_fp16
        return tensor.scheme.packed_format(tensor.shape, scales_are_fp16=fp16, exact=exact)
    return None


def _sizes(
    checkpoint: Checkpoint, model: ModelConfig, rounded: str, weights: str
) -> tuple[int, int]:
    """Parameters that are kept quantized in this form, and the bytes they take then."""
    parameters = nbytes = 0
    for tensor in stored_weights(checkpoint, model):
        if (fmt := _format(tensor, rounded, weights)) is not None:
            rows, columns = tensor.shape
            parameters += rows * columns
            nbytes += fmt.nbytes(rows, columns)
    return parameters, nbytes


@dataclass(frozen=True, slots=True)
class DequantizedTensors:
    """Quantized matrices of one stored type that become dense when they are loaded, and why."""

    stored: str
    reason: str
    names: tuple[str, ...]
    parameters: int


def dequantized_tensors(plan: Plan) -> list[DequantizedTensors]:
    """Those of the plan's checkpoint; of tensors that are fused, one may keep others dense."""
    weights = plan.resolved.weights
    kept_dense = plan.resolved.why["weights"] if weights == "dense" else None
    found: dict[tuple[str, str], list[GGUFTensor | QuantizedWeight]] = {}
    for tensor in plan.weights():
        if isinstance(tensor, SafetensorsTensor):
            continue
        if isinstance(tensor, QuantizedWeight):
            stored, reason = tensor.scheme.label, kept_dense
            if _format(tensor, "auto", weights) is None:
                reason = reason or tensor.scheme.why_dense(tensor.shape)
        elif (stored := tensor.quantization) in DENSE_TYPES:
            continue
        else:
            reason = kept_dense or why_not_packed(stored, tensor.shape)
        if reason is not None:
            found.setdefault((stored, reason), []).append(tensor)
    return [
        DequantizedTensors(
            stored,
            reason,
            tuple(tensor.name for tensor in tensors),
            sum(math.prod(tensor.shape) for tensor in tensors),
        )
        for (stored, reason), tensors in found.items()
    ]
