"""The modules of a sentence-transformers folder: what follows the model, up to a vector.

https://sbert.net/docs/sentence_transformer/usage/custom_models.html. Without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError

MODULES = "modules.json"
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_xlm-roberta_config.json",
)


@dataclass(frozen=True, slots=True)
class SentenceModule:
    """One line of modules.json."""

    kind: str
    """The last part of its class: Transformer, Pooling, Normalize, Dense, ..."""
    config: Mapping[str, Any]
    """The file of its settings; empty if it has none."""
    file: Path | None
    """Where that was read."""


def read_modules(folder: Path) -> tuple[SentenceModule, ...]:
    """In their order; empty for a folder that is not of sentence-transformers.

    Raises CheckpointError for a file that is not what it should be.
    """
    path = folder / MODULES
    if not path.is_file():
        return ()
    entries = _json(path)
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: not a list of modules. Download it again.")
    return tuple(_module(folder, path, entry) for entry in entries)


def _module(folder: Path, path: Path, entry: Any) -> SentenceModule:
    match entry:
        case {"type": str(kind), "path": str(place)} if ".." not in Path(place).parts:
            pass
        case _:
            raise CheckpointError(f"{path}: a module has no type and path. Download it again.")
    kind = kind.rpartition(".")[2]
    names = _TRANSFORMER_CONFIGS if kind == "Transformer" else ("config.json",)
    # "/x" would leave the folder.
    files = [folder / place.strip("/") / name for name in names]
    file = next((file for file in files if file.is_file()), None)
    config = {} if file is None else _json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object. Download it again.")
    return SentenceModule(kind, config, file)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
