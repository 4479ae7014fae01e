"""The shape of the code: who may import whom, what each process loads, how large things may grow.

Everything is read from the syntax trees, so imports inside functions and under TYPE_CHECKING count.
The rules themselves are tables in `architecture.py`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
from tests.architecture import (
    DISTRIBUTION_OF,
    ENGINE_PARTS,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MAY_IMPORT,
    MAY_NAME,
    MAY_PRINT,
    MAY_TOUCH_THE_ENVIRONMENT,
    ONLY_IN,
    OPTIONAL_PACKAGES,
    PEERS,
    ROOT,
    SIZE_EXCEPTIONS,
    SOURCE_ROOTS,
    imports_of,
    is_within,
    modules,
    our_imports,
)


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# ---- who imports whom --------------------------------------------------------------------------


def test_every_part_imports_only_what_lies_below_it() -> None:
    problems = []
    for module in modules().values():
        if module.part not in MAY_IMPORT:
            problems.append(
                f"{module.label}: {module.part!r} is no known part; add it to MAY_IMPORT"
            )
            continue
        for imported in our_imports(module):
            allowed = MAY_IMPORT[module.part] | {module.part}
            if imported.type_only:
                allowed = allowed | MAY_NAME.get(module.part, set())
            inner = imported.target.removeprefix("headrace.")
            if not is_within(inner, allowed):
                problems.append(
                    f"{module.label}:{imported.line}: {module.part} may not import {inner}"
                    f" (allowed: {', '.join(sorted(allowed))})"
                )
    report(problems)


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {
        name: {i.target for i in our_imports(module) if i.target != name}
        for name, module in modules().items()
    }
    finished: set[str] = set()

    def find_circle(name: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in finished or name not in graph:
            return None
        for target in sorted(graph[name]):
            if circle := find_circle(target, (*path, name)):
                return circle
        finished.add(name)
        return None

    circles = [circle for name in graph if (circle := find_circle(name, ()))]
    report([" -> ".join(circle) for circle in circles[:1]])


def test_every_import_of_ours_exists() -> None:
    report(
        [
            f"{module.label}:{imported.line}: there is no module {imported.target}"
            for module in modules().values()
            for imported in our_imports(module)
            if imported.target not in modules()
        ]
    )


def test_third_party_packages_stay_in_their_parts() -> None:
    problems = []
    for module in modules().values():
        for imported in imports_of(module):
            package = imported.target.split(".")[0]
            homes = ONLY_IN.get(package)
            if homes and not is_within(module.name, homes | {"headrace.cli"}):
                where = ", ".join(sorted(homes))
                problems.append(f"{module.label}:{imported.line}: {package} belongs in {where}")
    report(problems)


def test_every_third_party_import_is_declared() -> None:
    declared = _declared_distributions("dependencies")
    problems = []
    for module in modules().values():
        for imported in imports_of(module):
            package = imported.target.split(".")[0]
            home = OPTIONAL_PACKAGES.get(package)
            is_late = imported.in_function or imported.type_only
            if package in OPTIONAL_PACKAGES and (is_late or is_within(module.name, {home or ""})):
                continue
            if _is_third_party(package) and _distribution(package) not in declared:
                problems.append(f"{module.label}:{imported.line}: {package} is not a dependency")
    report(problems)


def test_every_import_of_tests_and_benches_is_declared() -> None:
    declared = _declared_distributions("dependencies", "dev", "peers", "ray", "triton", "clients")
    # Clients of older versions of openai's have an environment of their own.
    elsewhere = ROOT / "tests" / "clients" / "openai2"
    theirs = re.findall(r"^([a-z0-9-]+)", (elsewhere / "requirements.txt").read_text(), re.M)
    problems = []
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            # Types of a conftest, the benchmarks' own modules, what another Python runs.
            for package in {name.split(".")[0] for name in names} - {"tests", "bench", *PEERS}:
                known = {*declared, *(theirs if path.is_relative_to(elsewhere) else ())}
                if _is_third_party(package) and _distribution(package) not in known:
                    problems.append(f"{path.relative_to(ROOT)}: {package} is not in extra `dev`")
    report(problems)


def _is_third_party(package: str) -> bool:
    return package not in sys.stdlib_module_names and package not in SOURCE_ROOTS


def _distribution(package: str) -> str:
    return DISTRIBUTION_OF.get(package, package).replace("_", "-")


def _declared_distributions(*groups: str) -> set[str]:
    """The normalized names in [project] dependencies and the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    names = (re.match(r"[\w.-]+", line) for group in groups for line in lists[group])
    return {name[0].lower().replace("_", "-") for name in names if name}


def test_package_inits_import_nothing() -> None:
    problems = []
    for module in modules().values():
        if module.path.name != "__init__.py":
            continue
        if module.name == "headrace":
            eager = [i for i in our_imports(module) if not (i.in_function or i.type_only)]
            problems += [f"{module.label}:{i.line}: imports {i.target} eagerly" for i in eager]
        elif len(module.tree.body) > 1 or ast.get_docstring(module.tree) is None:
            problems.append(f"{module.label}: holds more, or less, than a docstring")
    report(problems)


def test_source_roots_and_tests_are_no_packages() -> None:
    found = [*ROOT.glob("server/__init__.py"), *ROOT.glob("kernels/__init__.py")]
    found += [*ROOT.glob("tests/**/__init__.py"), *ROOT.glob("bench/**/__init__.py")]
    report([f"{path.relative_to(ROOT)}: remove it" for path in found])


# ---- what a process loads ----------------------------------------------------------------------

HEAVY = ("torch", "triton", "ray", "transformers")


@pytest.mark.parametrize(
    ("name", "banned"),
    [
        ("headrace", (*HEAVY, "numpy", "fastapi", "pydantic", "headrace.llm")),
        ("headrace.cli", HEAVY),
        ("headrace.serve", HEAVY),
        ("headrace.api.app", HEAVY),
        ("headrace.engine.client", HEAVY),
        ("headrace.engine.process_client", HEAVY),
        ("headrace.models.config", HEAVY),
        ("headrace.loading.gguf", (*HEAVY, "numpy")),
        ("headrace.observability.metrics", HEAVY),
        ("headrace.bench.serve", HEAVY),
        ("headrace.route.door", (*HEAVY, "numpy", "fastapi", "pydantic", "headrace.serve")),
        ("headrace.chat", (*HEAVY, "fastapi", "pydantic", "headrace.serve")),
        ("headrace_kernels", ("torch", "triton")),
    ],
)
def test_importing_loads_nothing_heavy(name: str, banned: tuple[str, ...]) -> None:
    program = f"import sys, {name}; print(*[m for m in {banned!r} if m in sys.modules])"
    path = os.pathsep.join(str(root) for root in SOURCE_ROOTS.values())
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


COMPUTES = ("torch", "numpy", "psutil", "safetensors")
"""The dependencies that computing tokens takes; the others serve, show or encode them."""


def test_the_engine_imports_with_few_packages() -> None:
    """bench/gpu.py runs it on machines where nothing can be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    package_of = {name: package for package, name in DISTRIBUTION_OF.items()}
    banned = {package_of.get(name, name.replace("-", "_")) for name in names}
    served_only = {"attached_client", "channel", "process", "process_client", "socket_client"} | {
        "wire"
    }
    engine = [
        name
        for name in modules()
        if is_within(name, {f"headrace.{part}" for part in ENGINE_PARTS})
        and name.removeprefix("headrace.engine.") not in served_only
    ]
    program = (
        f"import importlib, sys; sys.modules |= dict.fromkeys({banned - set(COMPUTES)!r});"
        f"[importlib.import_module(name) for name in {engine!r}]"
    )
    path = os.pathsep.join(str(root) for root in SOURCE_ROOTS.values())
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# ---- house rules -------------------------------------------------------------------------------


def test_the_environment_is_read_in_config_only() -> None:
    problems = []
    for module in modules().values():
        if module.name in {"headrace.config", *MAY_TOUCH_THE_ENVIRONMENT}:
            continue
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            ) or (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
            ):
                problems.append(f"{module.label}:{node.lineno}: read it in config.py, pass it on")
    report(problems)


def test_only_command_lines_print() -> None:
    report(
        [
            f"{module.label}:{node.lineno}: use logging.getLogger(__name__)"
            for module in modules().values()
            if not is_within(module.name, set(MAY_PRINT))
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        ]
    )


def test_files_open_with_a_docstring() -> None:
    report([m.label for m in modules().values() if not ast.get_docstring(m.tree)])


def test_no_file_is_a_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers"}
    report([m.label for m in modules().values() if m.path.stem in drawers])


def test_sizes_stay_small() -> None:
    too_large = {label: size for label, size, limit in _sizes() if size > limit}
    problems = [
        f"{label}: {size} lines that are not blank: split it, or name the reason in SIZE_EXCEPTIONS"
        for label, size in too_large.items()
        if label not in SIZE_EXCEPTIONS
    ]
    stale = SIZE_EXCEPTIONS.keys() - too_large.keys()
    problems += [f"{label}: needs no exception any more" for label in sorted(stale)]
    report(problems)


def _sizes() -> Iterator[tuple[str, int, int]]:
    """(label, non-blank lines, limit) of all files and functions (without their docstrings)."""
    for folder in ("server", "kernels", "tests", "bench", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}:
                label = str(path.relative_to(ROOT))
                yield label, _non_blank(path.read_text().splitlines()), MAX_FILE_LINES
    for module in modules().values():
        lines = module.path.read_text().splitlines()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = _non_blank(lines[node.lineno - 1 : node.end_lineno])
                size -= _non_blank((ast.get_docstring(node) or "").splitlines())
                yield f"{module.label}::{node.name}", size, MAX_FUNCTION_LINES


def _non_blank(lines: list[str]) -> int:
    return sum(1 for line in lines if line.strip())
