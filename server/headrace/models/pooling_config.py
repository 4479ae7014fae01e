"""PoolingConfig: how hidden states become one vector, as a checkpoint says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from headrace.errors import CheckpointError, ConfigError

PoolingType = Literal["mean", "cls", "last"]
_MODES: dict[str, PoolingType] = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
_MODES |= {"mean": "mean", "cls": "cls"}  # values of the newer key `pooling_mode`


class Module(Protocol):
    """As loading/sentence_transformers.py reads them."""

    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    pooling: PoolingType
    """The mean over all tokens, the first one, or the last one."""
    normalize: bool = True
    """Vectors are made one long."""
    max_tokens: int | None = None
    """To which texts were cut when the model was trained."""
    source: str = "default"
    matryoshka: bool = False
    """Trained so that the first values of a vector are a vector (arXiv 2205.13147)."""

    @classmethod
    def of(
        cls,
        modules: Sequence[Module],
        hf_config: Mapping[str, object] | None = None,
        *,
        is_encoder: bool,
        chosen: Literal["auto", "mean", "cls", "last"] = "auto",
    ) -> PoolingConfig:
        """What the modules of sentence-transformers say. Without them the mean is taken, as that
        library does, or the last token of a decoder; `chosen`, the option, comes before both.

        Raises CheckpointError for a module that is not supported, ConfigError for a choice that
        makes no sense.
        """
        found = cls("mean" if is_encoder else "last")
        if modules:
            found = _from_modules(modules)
        keys = ("is_matryoshka", "matryoshka_dimensions")  # both are in use
        found = replace(found, matryoshka=any((hf_config or {}).get(key) for key in keys))
        if chosen == "auto":
            return found
        if chosen == "cls" and not is_encoder:
            raise ConfigError(
                "--pooling cls: the first token of a decoder knows nothing of the others. Use "
                "last or mean."
            )
        return replace(found, pooling=chosen)


def _from_modules(modules: Sequence[Module]) -> PoolingConfig:
    pooling: PoolingType | None = None
    max_tokens, normalize = None, False
    for module in modules:
        if module.kind == "Transformer":
            length = module.config.get("max_seq_length")
            max_tokens = length if isinstance(length, int) and length > 0 else None
        elif module.kind == "Pooling":
            pooling = _pooling_type(module.config)
        elif module.kind == "Normalize":
            normalize = True
        else:
            raise CheckpointError(
                f"modules.json: a module of type {module.kind!r} is not supported; Transformer, "
                "Pooling and Normalize are."
            )
    if pooling is None:
        raise CheckpointError("modules.json has no Pooling: it makes no vector of a text.")
    return PoolingConfig(pooling, normalize, max_tokens, "modules.json")


def _pooling_type(config: Mapping[str, Any]) -> PoolingType:
    names = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    named = config.get("pooling_mode")
    if isinstance(named, str):
        names = [named]
    names = [name for name in names if name not in ("include_prompt",)]
    if len(names) != 1 or names[0] not in _MODES:
        raise CheckpointError(
            f"The Pooling of modules.json takes {' and '.join(names) or 'nothing'}; supported is "
            f"one of {', '.join(_MODES)}."
        )
    return _MODES[names[0]]
