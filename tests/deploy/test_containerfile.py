"""The Containerfile names files, options, paths and extras that exist. It is not built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from headrace.api.health import router
from headrace.cli import _options, _parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Containerfile").read_text()
INSTRUCTIONS = [
    (found[1], re.sub(r"\s*\\\n\s*", " ", found[2]))
    for found in re.finditer(r"^([A-Z]+) ((?:.*\\\n)*.*)$", TEXT, re.M)
]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in INSTRUCTIONS if instruction == name]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets the path in: the last line that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#") and fnmatch(path, pattern.removeprefix("**/")):
            kept = line.startswith("!")
    return kept


def test_every_copied_path_exists_and_is_in_the_context() -> None:
    copied = [
        source
        for arguments in arguments_of("COPY")
        if not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]
    assert {"csrc", "kernels", "server", "setup.py", "constraints.txt"} <= set(copied)
    for source in copied:
        path = source.removeprefix("./")
        assert (ROOT / path).exists() and in_context(path)
    for path in (".git", ".venv", "tests", "server/headrace.egg-info", "kernels/x.so"):
        assert not in_context(path.rpartition("/")[2])


def test_what_the_build_needs_is_copied() -> None:
    """Files that pyproject.toml and setup.py read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = " ".join(arguments_of("COPY"))
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    for name in (
        *needed,
        "MANIFEST.in",
        *project["tool"]["setuptools"]["packages"]["find"]["where"],
    ):
        assert re.search(rf"(^|[ /]){re.escape(name)}( |$)", copied), name


def test_stages_exist_for_both_variants() -> None:
    names = re.findall(r"^FROM \S+ AS (\S+)$", TEXT, re.M)
    for variant in ("cpu", "cuda"):
        for stage in re.findall(r"^FROM (\S*\$\{VARIANT\})", TEXT, re.M):
            assert stage.replace("${VARIANT}", variant) in names
    assert set(re.findall(r"--from=(\S+)", TEXT)) <= set(names)
    bases = [base for base in re.findall(r"^FROM (\S+)", TEXT, re.M) if "/" in base]
    assert bases and all(re.search(r":[\w.-]*\d", base) for base in bases), "pinned by name"


def test_packages_come_in_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--build-arg EXTRAS=(\w+)", TEXT)
    assert extras and set(extras) <= project["optional-dependencies"].keys()
    pins = (ROOT / "constraints.txt").read_text()
    (model,) = re.findall(r"^ARG DEFAULT_MODEL=(\S+)$", TEXT, re.M)
    assert re.search(rf"^{model}==", pins, re.M) and re.search(r"^torch==", pins, re.M)
    for line in re.findall(r"pip install (.*)", TEXT):
        assert "-c constraints.txt" in line


def test_the_image_serves_beyond_itself_and_runs_as_nobody_special() -> None:
    (entrypoint,), (command,) = arguments_of("ENTRYPOINT"), arguments_of("CMD")
    assert json.loads(entrypoint) == ["headrace"]
    _, options, _ = _options(_parse(json.loads(command)))
    assert options.host == "0.0.0.0"
    assert arguments_of("EXPOSE") == [str(options.port)]
    assert arguments_of("USER") == ["10001:10001"]
    (check,) = arguments_of("HEALTHCHECK")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)[0]
    assert int(port) == options.port and path in {route.path for route in router.routes}
    compile(json.loads(check.partition("CMD ")[2])[2], "HEALTHCHECK", "exec")


@pytest.mark.slow
def test_hadolint_has_nothing_to_say() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    hadolint = found or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install -c constraints.txt 'headrace[manifests]'")
    done = subprocess.run([hadolint, str(ROOT / "Containerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
