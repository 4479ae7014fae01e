"""The architecture families by the names that checkpoints call them. Imports no torch."""

from __future__ import annotations

from headrace.errors import CheckpointError
from headrace.models import llama, mistral, qwen2, qwen3, smollm3
from headrace.models.encoder_config import known_encoders
from headrace.models.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    smollm3.FAMILY,
)


def known_architectures() -> list[str]:
    """Names of `architectures` in config.json that can be served."""
    return [name for family in FAMILIES for name in family.architectures]


def family_of_architecture(architecture: str) -> Family:
    """Raises CheckpointError, with the known ones, for an architecture that no family has."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    raise CheckpointError(
        f"The architecture {architecture!r} is not known. Known are: "
        f"{', '.join([*known_architectures(), *known_encoders()])}."
    )


def family_of_gguf(architecture: str) -> Family:
    """The family of `general.architecture` of a GGUF file. Raises CheckpointError."""
    for family in FAMILIES:
        if family.gguf_architecture == architecture:
            return family
    known = ", ".join(f.gguf_architecture for f in FAMILIES if f.gguf_architecture)
    raise CheckpointError(
        f"The GGUF architecture {architecture!r} is not known. Known are: {known}."
    )
