"""Which kernels have been checked on which GPU: what bench/gpu.py writes and dispatch.py asks.

A kernel counts as checked on an architecture as long as its sources are those that were checked.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from headrace_kernels.cuda import extension

PACKAGE = Path(__file__).parent
RECORD = PACKAGE / "verified.json"
"""{candidate: {stem: {architecture: hash of the sources}}}"""


def reason_unverified(candidate: str, stem: str, arch: str) -> str | None:
    """Why nothing vouches for this kernel on `arch`, or None if it was checked there as it is."""
    checked = _record().get(candidate, {}).get(stem, {})
    if arch not in checked:
        return f"never run on {arch}"
    if checked[arch] != source_hash(candidate, stem):
        return f"changed since it was checked on {arch}"
    return None


def source_hash(candidate: str, stem: str) -> str:
    """Of <candidate>/<stem>.py and of what it imports of that folder and of triton/.

    Of "cuda" also of what the built kernels were compiled from.
    """
    digest = hashlib.sha256()
    if candidate == "cuda":
        digest.update(extension.sources().encode())
    for path in sorted(_sources(PACKAGE / candidate / f"{stem}.py", set())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def record_verified(candidate: str, stem: str, arch: str) -> None:
    """Note in verified.json that the sources as they are now were checked on `arch`."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record.setdefault(candidate, {}).setdefault(stem, {})[arch] = source_hash(candidate, stem)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    _record.cache_clear()


@functools.cache
def _record() -> dict[str, dict[str, dict[str, str]]]:
    record: dict[str, dict[str, dict[str, str]]] = {}
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
    return record


def _sources(path: Path, found: set[Path]) -> set[Path]:
    if path in found or not path.exists():
        return found
    found.add(path)
    for name in _imported(path):
        package, _, rest = name.partition(".")
        folder, _, module = rest.partition(".")
        if package == PACKAGE.name and folder in (path.parent.name, "triton"):
            _sources(PACKAGE / folder / f"{module.split('.')[0]}.py", found)
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
