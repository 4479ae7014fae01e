"""What a model takes on this machine, worked out from file headers. Loads no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.config import EngineConfig, Hardware, ModelFacts, ResolvedConfig, resolve
from headrace.engine.hardware import probe
from headrace.loading.checkpoint import Checkpoint, open_checkpoint
from headrace.models.config import ModelConfig


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
    facts = ModelFacts(
        name=checkpoint.path.name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        max_position_embeddings=model.max_position_embeddings,
        kv_elements_per_token=model.kv_elements_per_token,
        checkpoint_dtype=model.checkpoint_dtype,
        vocab_size=model.vocab_size,
    )
    return Plan(checkpoint, model, hardware, resolve(config, hardware, facts))


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture as the checkpoint's own configuration describes it."""
    if checkpoint.gguf_metadata is not None:
        return ModelConfig.from_gguf(checkpoint.gguf_metadata, checkpoint.rope_frequency_factors)
    assert checkpoint.hf_config is not None, "a folder without config.json is refused when opened"
    return ModelConfig.from_hf(checkpoint.hf_config, checkpoint.generation_config)
