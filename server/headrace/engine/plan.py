"""What a model takes on this machine, worked out from file headers. Loads no weights, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from headrace.config import EngineConfig
from headrace.engine.hardware import probe
from headrace.engine.resolution import Hardware, ModelFacts, ResolvedConfig, resolve
from headrace.loading.checkpoint import Checkpoint, open_checkpoint
from headrace.loading.gguf_weights import GGUFTensor
from headrace.models.config import ModelConfig
from headrace.quantization.gguf_formats import DENSE_TYPES, packed_format, why_not_packed


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before weights are read."""

    checkpoint: Checkpoint
    model: ModelConfig
    hardware: Hardware
    resolved: ResolvedConfig


def make_plan(config: EngineConfig) -> Plan:
    """Open the checkpoint that `config.model` (a local path) names and resolve every option.

    Raises CheckpointError or ConfigError, with a remedy, for what cannot be run here.
    """
    checkpoint = open_checkpoint(Path(config.model))
    model = model_config(checkpoint)
    hardware = probe(config.device.device)
    packed_parameters, packed_bytes = _packed_sizes(checkpoint)
    _, exact_bytes = _packed_sizes(checkpoint, exact_scales=True)
    facts = ModelFacts(
        name=checkpoint.path.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        max_position_embeddings=model.max_position_embeddings,
        kv_elements_per_token=model.kv_elements_per_token,
        kv_rows_per_token=model.kv_rows_per_token,
        checkpoint_dtype=model.checkpoint_dtype,
        vocab_size=model.vocab_size,
        packed_parameters=packed_parameters,
        packed_bytes=packed_bytes,
        exact_bytes=exact_bytes,
    )
    return Plan(checkpoint, model, hardware, resolve(config, hardware, facts))


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture as the checkpoint's own configuration describes it."""
    if checkpoint.gguf_metadata is not None:
        return ModelConfig.from_gguf(checkpoint.gguf_metadata, checkpoint.rope_frequency_factors)
    assert checkpoint.hf_config is not None, "a folder without config.json is refused when opened"
    return ModelConfig.from_hf(checkpoint.hf_config, checkpoint.generation_config)


def _packed_sizes(checkpoint: Checkpoint, *, exact_scales: bool = False) -> tuple[int, int]:
    """Parameters that can be kept in packed form, and the bytes they take then."""
    parameters = nbytes = 0
    for tensor in checkpoint.weights():
        if not isinstance(tensor, GGUFTensor):
            continue
        fmt = packed_format(tensor.quantization, tensor.shape, exact_scales=exact_scales)
        if fmt is not None:
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
    kept_dense = plan.resolved.why["weights"] if plan.resolved.weights == "dense" else None
    found: dict[tuple[str, str], list[GGUFTensor]] = {}
    for tensor in plan.checkpoint.weights():
        if not isinstance(tensor, GGUFTensor) or tensor.quantization in DENSE_TYPES:
            continue
        reason = kept_dense or why_not_packed(tensor.quantization, tensor.shape)
        if reason is not None:
            found.setdefault((tensor.quantization, reason), []).append(tensor)
    return [
        DequantizedTensors(
            stored,
            reason,
            tuple(tensor.name for tensor in tensors),
            sum(math.prod(tensor.shape) for tensor in tensors),
        )
        for (stored, reason), tensors in found.items()
    ]
