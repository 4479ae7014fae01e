"""One run: who takes part, every measurement once a round, and what came of it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.peers import http_load
from bench.peers.contenders import VLLM_REMEDY, Contender, Headrace, LlamaCppBench, Vllm
from bench.peers.http_load import Load, Server
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.processes import PeerError, progress
from bench.peers.record import Measures
from bench.peers.workload import INT8_TERA_OPS, READ_GB, ModelSize, Workload

INPUT_TOKENS, PREFILL_TOKENS = 32, 512
BATCHES = (1, 8, 16, 32)
MAX_FAILURES = 2  # of one contender in one kind of measurement; then it is asked no more
Part = TypeVar("Part")
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked for."""

    model: Path
    threads: int
    output_tokens: int
    seed: int
    load: Load
    skip: Sequence[str] = ()
    llama_cpp: Path | None = None
    vllm_python: Path | None = None
    work: Path
    """Converted models are made, and found again, here."""
    scratch: Path

    def workloads(self) -> list[Workload]:
        decode = [Workload(batch, INPUT_TOKENS, self.output_tokens) for batch in BATCHES]
        return [Workload(1, PREFILL_TOKENS, 0), *decode]


@dataclass
class Comparison:
    """Filled by `prepare` and `round`; `close` ends every process it started."""

    settings: Settings
    absent: dict[str, str] = field(default_factory=dict)
    """Who does not take part, and why."""
    notes: dict[str, str] = field(default_factory=dict)
    """What failed on the way."""
    measures: list[Measures] = field(default_factory=list)
    contenders: list[Contender] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    models: list[Path] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)

    # --- who takes part ---------------------------------------------------------------------

    def prepare(self) -> None:
        """Find or build every part that was not left out; each loads its models now."""
        settings = self.settings
        llama_cpp = self._part(
            "llama.cpp",
            lambda: LlamaCpp.find(settings.llama_cpp, settings.threads, settings.scratch),
        )
        self.models = [settings.model]
        if llama_cpp is not None:
            # The file that llama.cpp is fastest with, made of the first.
            target = settings.work / f"{settings.model.stem.split('.')[0]}.Q4_0.gguf"
            made = self._part("q4_0", lambda: llama_cpp.quantize(settings.model, target, "Q4_0"))
            self.models += [made] if made else []
        self.measures = [Measures(path.name) for path in self.models]
        self._take(self._part("headrace", self._headrace))
        if llama_cpp is not None:
            self._take(self._part("llama.cpp", lambda: LlamaCppBench(llama_cpp)))
        self._take(self._part("vllm", self._vllm))
        self.servers = self._part("http", lambda: self._servers(llama_cpp)) or []

    def _part(self, name: str, build: Callable[[], Part]) -> Part | None:
        """What `build` makes, or None and a reason in `absent`."""
        if name in self.settings.skip:
            self.absent[name] = "left out by --skip"
            return None
        progress(f"preparing {name}")
        try:
            return build()
        except PeerError as error:
            self.absent[name] = str(error)
            return None

    def _take(self, contender: Contender | None) -> None:
        if contender is not None:
            self.contenders.append(contender)

    def _headrace(self) -> Headrace:
        return Headrace(self.models, self.settings.threads, self.settings.scratch)

    def _vllm(self) -> Vllm:
        settings = self.settings
        if settings.vllm_python is None:
            raise PeerError(f"no --vllm-python: {VLLM_REMEDY}")
        return Vllm(
            settings.vllm_python, settings.model, settings.threads, settings.work, settings.scratch
        )

    def _servers(self, llama_cpp: LlamaCpp | None) -> list[Server]:
        settings = self.settings
        servers = [http_load.headrace_server(settings.model, settings.threads)]
        if llama_cpp is not None:
            servers.append(http_load.llama_server(llama_cpp, settings.model, settings.load))
        return servers

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for contender in self.contenders:
                stack.callback(contender.close)

    # --- measuring --------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """Every measurement once with every contender; who begins changes from round to round."""
        seed = self.settings.seed + number
        order = _turned(self.contenders, number)
        self._measure_ceilings()
        for measures, model in zip(self.measures, self.models, strict=True):
            for workload in self.settings.workloads():
                for contender in order:
                    self._measure(contender, model, measures, workload, number, seed)
        for server in _turned(self.servers, number):
            self._serve(server, number, seed)

    def _measure(
        self,
        contender: Contender,
        model: Path,
        measures: Measures,
        workload: Workload,
        number: int,
        seed: int,
    ) -> None:
        every_file = contender.name != "vllm"  # its one set of bf16 weights stands beside each
        if not every_file and model != self.models[0]:
            return
        rate = self._try(
            contender.name,
            f"round {number}, {model.name}, {workload.name}",
            lambda: contender.measure(model, workload, seed),
        )
        if rate is not None:
            for target in [measures] if every_file else self.measures:
                target.add(workload.name, contender.name, number, rate)

    def _serve(self, server: Server, number: int, seed: int) -> None:
        settings, who = self.settings, f"{server.name} over HTTP"
        found = self._try(
            who,
            f"round {number}",
            lambda: http_load.measure(server, settings.load, seed, settings.scratch),
        )
        if found is not None:
            figures, note = found
            for row, value in figures.items():
                self.measures[0].add(row, server.name, number, value)
            if note:
                self.notes[f"{who}, round {number}"] = note

    def _measure_ceilings(self) -> None:
        ours = next((one for one in self.contenders if isinstance(one, Headrace)), None)
        if ours is not None:
            for name, value in (self._try("ceilings", "measured", ours.ceilings) or {}).items():
                self.ceilings.setdefault(name, []).append(value)

    def _try(self, who: str, what: str, measure: Callable[[], Found]) -> Found | None:
        """A failure costs this measurement, not the run."""
        if self._failures.get(who, 0) >= MAX_FAILURES:
            return None
        progress(f"{who}: {what}")
        try:
            return measure()
        except PeerError as error:
            self._failures[who] = self._failures.get(who, 0) + 1
            given_up = self._failures[who] == MAX_FAILURES
            self.notes[f"{who}, {what}"] = str(error) + (" (given up)" if given_up else "")
            return None

    # --- afterwards -------------------------------------------------------------------------

    def median_ceilings(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.ceilings.items()}

    def set_limits(self) -> None:
        """The limit of every row of the engines, from the ceilings of this run."""
        ceilings = self.median_ceilings()
        if not {READ_GB, INT8_TERA_OPS} <= ceilings.keys():
            return
        for measures, model in zip(self.measures, self.models, strict=True):
            size = ModelSize.of(model)
            measures.limits = {
                workload.name: size.limit(workload, ceilings[READ_GB], ceilings[INT8_TERA_OPS])
                for workload in self.settings.workloads()
            }


def _turned(parts: Sequence[Part], number: int) -> list[Part]:
    turn = number % len(parts) if parts else 0
    return [*parts[turn:], *parts[:turn]]
