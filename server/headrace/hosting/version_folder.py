"""A folder whose numbered entries are the versions of one model: what is there, and since when.

NAME/1, NAME/2, ...: each a folder with a checkpoint, or N.gguf. A version is put there by a rename,
which is atomic, and is never changed afterwards. Who copies it in place instead is waited for.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISDIR

from headrace.config import EngineConfig, ServerOptions
from headrace.errors import ConfigError
from headrace.hosting.rollout import Content, Policy, Seen

QUIET_SECONDS = 5.0
"""What has not changed for so long is no copy that goes on."""

_NUMBERED = re.compile(r"([0-9]{1,18})(\.gguf)?")


class VersionFolder:
    def __init__(self, path: Path, policy: Policy, poll_interval: float) -> None:
        self.path = path
        self.policy = policy
        self.poll_interval = poll_interval
        self._last: dict[int, Content] = {}

    def path_of(self, version: int) -> Path:
        """Where the files of a version are, or were."""
        entries: dict[int, Path] = {}
        with contextlib.suppress(OSError):
            entries = _entries(self.path)
        return entries.get(version, self.path / str(version))

    def look(self) -> Seen:
        """The versions that are there: their contents, None for one that still changes. Blocks.

        Raises OSError if the folder cannot be read, which says nothing about the versions.
        """
        now = time.time()
        seen: dict[int, Content | None] = {}
        contents: dict[int, Content] = {}
        for number, path in _entries(self.path).items():
            found, changed = _content(path)
            if found:
                contents[number] = found
            quiet = found and (self._last.get(number) == found or changed < now - QUIET_SECONDS)
            seen[number] = found if quiet else None
        self._last = contents
        return seen


def version_folder(config: EngineConfig, options: ServerOptions) -> VersionFolder | None:
    """The versions that `config.model` names; None if it is a model itself.

    Raises ConfigError for options that do not fit, and for versions that are asked for and none of
    which is there.
    """
    policy = parse_policy(options.model_versions)
    path = Path(config.model or os.devnull).expanduser()
    versions = sorted(_entries(path)) if path.is_dir() and not _is_checkpoint(path) else []
    if not versions:
        if policy == Policy("latest"):
            return None
        raise ConfigError(
            f"--model-versions {options.model_versions}: {config.model or 'the default model'} has "
            "no versions, which are numbered folders in it. Leave the option out."
        )
    if options.model_poll_interval <= 0:
        raise ConfigError(
            f"--model-poll-interval must be more than 0, got {options.model_poll_interval}."
        )
    if not policy.choose(versions):
        there = ", ".join(map(str, versions))
        raise ConfigError(
            f"--model-versions {options.model_versions}: not in {path}, which has {there}."
        )
    return VersionFolder(path, policy, options.model_poll_interval)


def parse_policy(text: str) -> Policy:
    """Raises ConfigError for what is neither latest nor all nor numbers."""
    if text in ("latest", "all"):
        return Policy(text)
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(f"--model-versions {text!r}: latest, all, or numbers such as 2,3.")
    return Policy("specific", frozenset(map(int, numbers)))


def _entries(folder: Path) -> dict[int, Path]:
    """A folder 3 goes before a file 3.gguf."""
    found: dict[int, Path] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
            match = _NUMBERED.fullmatch(entry.name)
            if match and (entry.is_file() if match[2] else entry.is_dir()):
                found[int(match[1])] = Path(entry.path)
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether files of a model lie in the folder itself."""
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return True
    return any(not _NUMBERED.fullmatch(file.name) for file in path.glob("*.gguf"))


def _content(path: Path) -> tuple[Content, float]:
    """Names, sizes and times of all files, and when one of them was last touched.

    A file that goes away meanwhile is left out: the next look sees another content."""
    files: list[tuple[str, int, int, int]] = []
    changed = 0.0
    for file in _walk(path):
        try:
            stat = os.stat(file)
        except OSError:
            continue
        # The time of a change of the inode: it cannot be set, as a copy sets that of the file.
        changed = max(changed, stat.st_ctime)
        if not S_ISDIR(stat.st_mode):
            name = os.path.relpath(file, path)
            files.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(sorted(files)), changed


def _walk(path: Path) -> Iterable[str]:
    yield str(path)
    for folder, folders, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in (*folders, *names))
