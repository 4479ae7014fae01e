"""What a model path holds: configuration, tokenizer assets, weights, digest.

`open_checkpoint` reads headers and small files only, without torch; weights are read later, one at
a time, straight from the mapped files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headrace.errors import CheckpointError
from headrace.loading.gguf import GGUFFile
from headrace.loading.gguf_weights import GGUFTensor, gguf_weights, rope_frequency_factors
from headrace.loading.safetensors import (
    SafetensorsFile,
    SafetensorsTensor,
    open_safetensors,
)
from headrace.loading.sentence_transformers import MODULES, SentenceModule, read_modules

# Larger than any real configuration or tokenizer (the largest tokenizer.json has about 35 MB).
_MAX_JSON_BYTES = 256 << 20
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
_EDGE_BYTES = 64 << 10
_SAMPLES = 64
_SAMPLE_BYTES = 4 << 10


@dataclass(frozen=True)
class TokenizerAssets:
    """What the text layer needs to build a tokenizer and to render chats. Absent parts are None.

    chat_template: the template, or templates by name ("default", "tool_use", ...).
    gguf_metadata: set for a GGUF file, whose header holds tokenizer and template; all else is None.
    """

    tokenizer_json: Path | None = None
    tokenizer_config: dict[str, Any] | None = None
    special_tokens_map: dict[str, Any] | None = None
    chat_template: str | dict[str, str] | None = None
    gguf_metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    kind: how the weights are stored.
    hf_config, generation_config: the JSON files of a folder; None for a GGUF file.
    gguf_metadata: the header of a GGUF file; None for a folder.
    rope_frequency_factors: [D/2] divisors of the rotary frequencies, which a GGUF file of a Llama 3
        model carries instead of a `rope_scaling` configuration; else None.
    modules: those of sentence-transformers, of a folder that has them.
    files: the open weight files. texts: the small files that the digest covers.
    """

    path: Path
    kind: Literal["safetensors", "gguf"]
    files: tuple[GGUFFile | SafetensorsFile, ...]
    tokenizer: TokenizerAssets
    texts: tuple[Path, ...] = ()
    hf_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    gguf_metadata: Mapping[str, Any] | None = None
    rope_frequency_factors: tuple[float, ...] | None = None
    modules: tuple[SentenceModule, ...] = ()

    def weights(self) -> Iterator[GGUFTensor | SafetensorsTensor]:
        """Every weight under its Hugging Face name, in disk order; bytes are read by `read_into`.

        Raises CheckpointError for a GGUF architecture or tensor that we have no name for.
        """
        for file in self.files:
            yield from gguf_weights(file) if isinstance(file, GGUFFile) else file.tensors

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on disk: the sum of their `nbytes`, the total of a progress bar."""
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    @cached_property
    def digest(self) -> str:
        """ "sha256:" and 64 hex digits that name weights, configuration, tokenizer and template.

        Covers name and bytes of each of `texts`, and of each weight file what `_hash_weights` says.
        """
        digest = hashlib.sha256(b"headrace checkpoint 1\n")
        for file in self.files:
            _hash_weights(digest, file)
        for path in self.texts:
            content = _read_bytes(path)
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
        return f"sha256:{digest.hexdigest()}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder in the Hugging Face layout (safetensors) or a .gguf file.

    A folder without safetensors but with exactly one .gguf file stands for that file. Reads headers
    and small files only. Raises CheckpointError for missing, corrupt or unsupported files, naming
    the file.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: give the folder that holds this file, not the file.")
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder.")
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return _open_folder(path)
    return _open_gguf(_only_gguf(path))


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    return Checkpoint(
        path=path,
        kind="gguf",
        files=(file,),
        tokenizer=TokenizerAssets(gguf_metadata=file.metadata),
        gguf_metadata=file.metadata,
        rope_frequency_factors=rope_frequency_factors(file),
    )


def _open_folder(path: Path) -> Checkpoint:
    hf_config = _read_json(path / "config.json")
    if hf_config is None:
        raise CheckpointError(f"{path}: there is no config.json. Download it to this folder.")
    texts = [path / name for name in _TEXT_FILES if (path / name).is_file()]
    modules = read_modules(path)
    if modules:
        texts += [path / MODULES, *(module.file for module in modules if module.file)]
    return Checkpoint(
        path=path,
        kind="safetensors",
        files=open_safetensors(path),
        tokenizer=_folder_tokenizer(path),
        texts=(*texts, *_template_files(path)),
        hf_config=hf_config,
        generation_config=_read_json(path / "generation_config.json"),
        modules=modules,
    )


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: several GGUF files ({names}). Give the path of one.")
    pickles = [file.name for end in ("*.bin", "*.pt", "*.pth") for file in folder.glob(end)]
    if pickles:
        raise CheckpointError(
            f"{folder}: the weights are pickle files ({', '.join(sorted(pickles)[:3])}), which can "
            "run code when read and are never loaded. Convert the model to safetensors."
        )
    numbered = [entry.name for entry in folder.iterdir() if entry.name.isdecimal()]
    versions = f" It has versions: give one, such as {folder / max(numbered)}." if numbered else ""
    raise CheckpointError(f"{folder}: no weights here (*.safetensors or *.gguf).{versions}")


def _folder_tokenizer(folder: Path) -> TokenizerAssets:
    tokenizer_json = folder / "tokenizer.json"
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    return TokenizerAssets(
        tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
        tokenizer_config=tokenizer_config,
        special_tokens_map=_read_json(folder / "special_tokens_map.json"),
        chat_template=_chat_template(folder, tokenizer_config or {}),
    )


def _template_files(folder: Path) -> list[Path]:
    """chat_template.jinja, and the named templates that newer repositories keep beside it."""
    return [
        *folder.glob("chat_template.jinja"),
        *sorted((folder / "additional_chat_templates").glob("*.jinja")),
    ]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Template files win over chat_template.json, and that over tokenizer_config.json."""
    if files := _template_files(folder):
        named = {
            "default" if file.parent == folder else file.stem: _read_text(file) for file in files
        }
        return named["default"] if list(named) == ["default"] else named
    stored = (_read_json(folder / "chat_template.json") or config).get("chat_template")
    where = f"{folder}: chat_template"
    match stored:
        case None | str():
            return stored
        case list():
            try:
                return {str(entry["name"]): str(entry["template"]) for entry in stored}
            except (TypeError, KeyError):
                raise CheckpointError(f"{where}: entries need a name and a template.") from None
        case _:
            raise CheckpointError(f"{where}: neither a string nor a list of named templates.")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error}). Download it again.") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object. Download it again.")
    return value


def _hash_weights(digest: hashlib._Hash, file: GGUFFile | SafetensorsFile) -> None:
    """Size, whole header, and of the data the first and last 64 KiB and 64 samples of 4 KiB.

    The header of a GGUF file holds the tokenizer and the template. The samples lie at equal
    distances: a different model, quantization or training step changes them; a single flipped bit
    may not (this names a model, it does not prove that a download is whole).
    """
    view = file.view()
    digest.update(f"weights {file.size}\n".encode())
    digest.update(view[: file.data_start])
    data = view[file.data_start :]
    if len(data) <= 2 * _EDGE_BYTES + _SAMPLES * _SAMPLE_BYTES:
        digest.update(data)
        return
    digest.update(data[:_EDGE_BYTES])
    stride = (len(data) - 2 * _EDGE_BYTES) // _SAMPLES
    for start in range(_EDGE_BYTES, _EDGE_BYTES + _SAMPLES * stride, stride):
        digest.update(data[start : start + _SAMPLE_BYTES])
    digest.update(data[-_EDGE_BYTES:])
