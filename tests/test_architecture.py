"""The shape of the code: who may import whom, what each process loads, how large things may grow.

Everything is read from the syntax trees, so imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = {"headrace": ROOT / "server", "headrace_kernels": ROOT / "kernels"}

# What each part of the server may import of ours, besides itself. "engine.client" allows that one
# module of a part.
VALUES = {"errors", "sampling_params", "config", "observability"}
# What the API process loads of the engine; the rest needs torch.
CLIENT_SIDE = {
    "engine.client",
    "engine.live_requests",
    "engine.process_client",
    "engine.attached_client",
    "engine.queue_board",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "sampling_params": {"errors"},
    "config": {"errors"},
    "observability": {"errors"},
    "text": VALUES,
    "api": VALUES | {"text", "engine.client"},
    "headrace_kernels": set(),
    "quantization": VALUES | {"headrace_kernels"},
    "layers": VALUES | {"quantization", "headrace_kernels"},
    "models": VALUES | {"layers", "quantization", "headrace_kernels"},
    "loading": {"errors"},
    "engine": VALUES | {"models", "layers", "loading", "quantization", "headrace_kernels"},
    "llm": VALUES | {"engine", "text", "loading"},
    "http_connection": set(),
    "listening": {"errors"},
    "serve": VALUES | {"api", "text", "loading", "listening", "http_connection"} | CLIENT_SIDE,
    "api_processes": VALUES | {"api", "serve", "listening", "engine.channel"} | CLIENT_SIDE,
    "deploy": VALUES | {"api", "serve", "listening"},
    "bench": {"errors", "config"},
    "chat": {"errors", "config", "bench.http_client"},
    "cli_reports": {"errors", "config", "engine", "loading", "serve", "headrace_kernels"},
}
# The root package resolves its public names lazily; the command line may import everything.
MAY_IMPORT["headrace"] = {"llm", "sampling_params"}
MAY_IMPORT["cli"] = MAY_IMPORT.keys() - {"cli", "headrace"}
MAY_IMPORT["__main__"] = {"cli"}

# Allowed under TYPE_CHECKING only: annotations need the names, the process not the module.
MAY_NAME = {"observability": {"engine.client"}}

# Third-party packages that belong to some parts only, wherever the import stands.
ONLY_IN = {
    "triton": {"headrace_kernels.triton"},
    "ray": {"headrace.deploy"},
    "transformers": {"headrace.text"},
    "fastapi": {"headrace.api", "headrace.deploy", "headrace.serve"},
    "torch": {
        "headrace_kernels",
        "headrace.engine",
        "headrace.layers",
        "headrace.llm",
        "headrace.loading",
        "headrace.models",
        "headrace.quantization",
    },
}
# Not among the dependencies: imported inside a function by the feature that needs it, or at the
# top of files that nobody imports without it.
OPTIONAL_PACKAGES = {
    "triton": "headrace_kernels.triton",
    "ray": "headrace.deploy",
    "transformers": None,
    "pynvml": None,
}
DISTRIBUTION_OF = {
    "llama_index": "llama-index-core",
    "pydantic_ai": "pydantic-ai-slim",
    "yaml": "pyyaml",
}
ENGINE_PARTS = ("engine", "models", "layers", "loading", "quantization", "sampling_params")

# Besides config.py, which reads it.
MAY_TOUCH_THE_ENVIRONMENT = {
    "headrace.deploy.switches": "sets Ray's own switches, which Ray takes from nowhere else",
    "headrace_kernels.dispatch": "asks what Triton asks, whether its kernels are interpreted",
}
MAY_PRINT = {
    "headrace.cli": "it is the command line",
    "headrace.bench": "its table is its result",
    "headrace.deploy.local_cluster": "it is the command line of `make serve-ray`",
    "headrace_kernels.cuda.compile_gate": "it is a command line",
    "headrace_kernels.triton.compile_gate": "it is a command line",
}

# Other engines, imported by the benchmarks where they are.
PEERS = {"vllm", "sglang", "xgrammar"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# path, or path::function -> why it may be longer
SIZE_EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Import:
    target: str
    """The dotted module; for `from a import b`, a.b where that is a module of ours."""
    line: int
    in_function: bool
    type_only: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module = field(repr=False)

    @property
    def label(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(name: str) -> str:
    """headrace.engine.scheduler -> engine; headrace -> headrace; all kernels are one part."""
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "headrace" and rest else package


@cache
def modules() -> dict[str, Module]:
    found = {}
    for package, root in SOURCE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


@cache
def imports_of(module: Module) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, type_only: bool) -> None:
        for target in _targets(module, node):
            found.append(Import(target, getattr(node, "lineno", 0), in_function, type_only))
        guarded = node.body if isinstance(node, ast.If) and _is_type_checking(node.test) else []
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, type_only or child in guarded)

    visit(module.tree, False, False)
    return found


def _targets(module: Module, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, (
            f"{module.label}:{node.lineno}: import by the full name, not relatively"
        )
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            # A constant of the root package, not the lazy names behind it.
            if submodule != "headrace.__version__":
                yield submodule if submodule in modules() else node.module


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def our_imports(module: Module) -> Iterator[Import]:
    for imported in imports_of(module):
        if imported.target.split(".")[0] in SOURCE_ROOTS:
            yield imported


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def is_within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


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
