"""The rules of the code's shape, as data, and the syntax trees that they are held against."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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
    # The plan is made in a process of its own.
    "hosting": VALUES | {"api", "text", "loading", "engine.hardware", "engine.plan"} | CLIENT_SIDE,
    "serve": VALUES | {"api", "hosting", "loading", "listening", "http_connection"} | CLIENT_SIDE,
    "api_processes": VALUES
    | {"api", "hosting", "serve", "listening", "engine.channel"}
    | CLIENT_SIDE,
    "deploy": VALUES | {"api", "serve", "listening"},
    "route": VALUES | {"listening", "http_connection"},
    "monitoring": {"observability", "route.metrics", "route.waking"},
    "bench": {"errors", "config"},
    "chat": {"errors", "config", "bench.http_client"},
    "cli_reports": {"errors", "config", "engine", "loading", "hosting", "headrace_kernels"},
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
    "ray": {"headrace.deploy", "headrace.route.ray_source"},
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
    "headrace.deploy.node_report": "tells which of them a node has",
    "headrace_kernels.dispatch": "asks what Triton asks, whether its kernels are interpreted",
}
MAY_PRINT = {
    "headrace.cli": "it is the command line",
    "headrace.bench": "its table is its result",
    "headrace.deploy.local_cluster": "it is the command line of `make serve-ray`",
    "headrace.deploy.node_report": "its line is its answer",
    "headrace.route.ray_source": "its lines are what the door reads",
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


def is_within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
