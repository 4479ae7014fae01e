"""What the command line shows: the progress of a start, what is served, the plan, the kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from headrace.config import GIB, MIB, EngineConfig
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.hosting.model_host import ServedFacts


# By a model's first task: a route, and what to ask there.
EXAMPLES = {
    "generate": ("/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'),
    "embed": ("/v1/embeddings", '"input": "Hello!"'),
    "classify": ("/v1/moderations", '"input": "Hello!"'),
}


def stderr() -> Console:
    """Where people read what is going on; results go to standard output."""
    return Console(stderr=True, highlight=False)


class LoadingBar:
    """Bytes and rate of the weights, on a terminal; silent elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("Loading weights"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("load", total=None, visible=False)

    def __enter__(self) -> LoadingBar:
        self._progress.start()
        return self

    def update(self, bytes_read: int, bytes_total: int) -> None:
        self._progress.update(self._task, completed=bytes_read, total=bytes_total, visible=True)

    def stop(self) -> None:
        self._progress.stop()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def print_ready(console: Console, facts: ServedFacts, url: str) -> None:
    """What is served, on what, and how to ask it."""
    info, names = facts.info, facts.names
    cache = "none"
    if tokens := info.num_blocks * info.block_size:
        cache = (
            f"{_size(info.kv_cache_bytes)}: {tokens:,} tokens, or "
            f"{tokens / info.max_model_len:.1f} requests of {info.max_model_len:,}"
        )
    stems: dict[str, list[str]] = {}
    for stem, name in sorted(info.kernels.items()):
        stems.setdefault(name, []).append(stem)
    kernels = "; ".join(f"{name} ({', '.join(found)})" for name, found in stems.items())
    rows = [
        ("Model", f"{', '.join(names)} ({facts.path.name})"),
        ("Weights", f"{_size(info.weight_bytes)}, read in {info.load_seconds:.1f} s"),
        ("Device", _device(info.device, info.threads, info.cpu_isa)),
        ("Kernels", kernels),
        ("KV cache", cache),
        ("Tasks", ", ".join(info.tasks)),
        ("Output", facts.text_formats),
        ("URL", f"{url}/v1"),
    ]
    console.print()
    for name, value in rows:
        console.print(f"  [bold]{name:<10}[/]{value}", markup=True, soft_wrap=True)
    route, asked = EXAMPLES[info.tasks[0]]
    body = f'{{"model": "{names[0]}", {asked}}}'
    console.print(
        f"\n  curl {url}{route} -H 'Content-Type: application/json' \\\n    -d '{body}'\n",
        markup=False,
        soft_wrap=True,
    )


def _device(device: str, threads: int, cpu_isa: str) -> str:
    isa = "" if cpu_isa == "none" else f", {cpu_isa} kernels"
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}{isa}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def print_plan(config: EngineConfig, sources: Mapping[str, str]) -> None:
    """What a model would take here. `sources`: where each option that is not a default came from.

    Raises CheckpointError or ConfigError for what cannot be planned.
    """
    from headrace.engine.plan import make_plan

    plan = make_plan(_with_local_model(config))
    resolved, model = plan.resolved, plan.model
    table = Table("value", "", "where from", box=None, pad_edge=False)
    scheme = model.quantization
    stored = model.checkpoint_dtype if scheme is None else scheme.label
    rows = [
        ("model", str(plan.checkpoint.path), f"{model.architecture}, {stored}"),
        ("parameters", f"{model.num_parameters:,}", "config"),
        ("device", resolved.device, plan.hardware.name),
    ]
    for name in (
        "dtype",
        "kv_cache_dtype",
        "threads",
        "cpu_isa",
        "block_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "num_blocks",
    ):
        why = resolved.why[name]
        why = sources.get(name, why) if why == "given" else why
        rows.append((name, str(getattr(resolved, name)), why))
    kv_per_token = f"{resolved.kv_bytes_per_token:,} bytes a token"
    if resolved.memory is not None:
        rows += [(name, _size(size), why) for name, size, why in resolved.memory.lines()]
    rows += [
        ("weights", _size(resolved.weight_bytes), resolved.why["weight_bytes"]),
        ("KV cache", _size(resolved.kv_cache_bytes), resolved.why["kv_cache_bytes"]),
    ]
    if resolved.kv_bytes_per_token:
        rows += [
            ("KV capacity", f"{resolved.kv_capacity_tokens:,} tokens", kv_per_token),
            (
                "concurrency",
                f"{resolved.full_context_concurrency:.1f}",
                f"requests of {resolved.max_model_len:,} tokens at once",
            ),
        ]
    pooling = plan.pooling
    form = ", vectors made one long" if pooling.normalize else ""
    rows.append(("pooling", f"{pooling.pooling}{form}", sources.get("pooling", pooling.source)))
    for row in rows:
        table.add_row(*row)
    _stdout().print(table)


def print_kernels(config: EngineConfig, *, compile: bool) -> None:
    """Which kernel each op uses here, and why. `compile`: load the model once, so that what a GPU
    runs is compiled.

    Raises CheckpointError or ConfigError for what cannot be planned.
    """
    from headrace.engine.build import explicit_kernels, kernel_facts
    from headrace.engine.plan import dequantized_tensors, make_plan
    from headrace_kernels import dispatch

    plan = make_plan(_with_local_model(config))
    resolved = plan.resolved
    device = _device(resolved.device, resolved.threads, resolved.cpu_isa)
    _stdout().print(f"{plan.hardware.name}: {device}\n")
    facts = kernel_facts(plan.resolved, plan.model)
    table = Table("op", "kernel", "chosen", "reason", box=None, pad_edge=False)
    try:
        decisions = dispatch.explain(facts, explicit_kernels(plan.resolved.kernel))
    except dispatch.KernelUnavailableError as error:
        raise ConfigError(f"--kernel: {error}") from None
    for decision in decisions:
        chosen = "yes" if decision.chosen else ""
        table.add_row(decision.stem, decision.candidate, chosen, decision.reason)
    _stdout().print(table)
    if dequantized := dequantized_tensors(plan):
        table = Table("tensors", "stored as", "parameters", "dequantized because", box=None)
        table.pad_edge = False
        for row in dequantized:
            names = (
                row.names[0] if len(row.names) == 1 else f"{len(row.names)}: {row.names[0]}, ..."
            )
            table.add_row(names, row.stored, f"{row.parameters:,}", row.reason)
        _stdout().print("", table)
    if compile:
        _compile(config)


def _compile(config: EngineConfig) -> None:
    """An engine compiles what its steps run before it is ready; the compiler's cache keeps it."""
    from headrace.engine.build import build_engine

    start = time.monotonic()
    engine = build_engine(_with_local_model(config))
    if engine.info.device == "cpu":
        _stdout().print("\nThe kernels of a CPU are compiled when Headrace is installed.")
    else:
        _stdout().print(f"\nCompiled and loaded in {time.monotonic() - start:.1f} s.")


def _with_local_model(config: EngineConfig) -> EngineConfig:
    from headrace.loading.resolver import resolve_model

    path = resolve_model(config.model, revision=config.model_options.revision)
    return replace(config, model=str(path))


def _stdout() -> Console:
    # Piped output has no width of its own to fit into.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)
