"""What decoding keeps of its rate when another process takes one of the cores.

    .venv/bin/python -m bench.stolen_core --save bench/results/stolen_core.json

In turn, undisturbed and with a process that only spins, pinned to one of the cores that the engine
uses: Headrace, and llama.cpp where it is found. A fair scheduler leaves the engine half of that
core. With work handed out in small pieces an engine on two cores can keep 0.75 of its rate at
best, and 0.5 on one core alone; one that waits at a barrier for the thread that is not running
keeps much less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.contenders import Contender, Headrace, LlamaCppBench
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.processes import PeerError, kill, progress, sigterm_as_interrupt, start
from bench.peers.record import command, markdown
from bench.peers.workload import Workload

from headrace.engine.hardware import probe
from headrace.errors import HeadraceError
from headrace.loading.resolver import resolve_model

INPUT_TOKENS = 32
BATCHES = (1, 16)
SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@dataclass(frozen=True)
class Case:
    """One contender and batch: decode rates in tok/s, a pair each round."""

    name: str
    undisturbed: list[float]
    disturbed: list[float]

    @property
    def kept(self) -> float:
        """The median over rounds of the fraction of the rate that is left."""
        pairs = zip(self.disturbed, self.undisturbed, strict=True)
        return statistics.median(disturbed / undisturbed for disturbed, undisturbed in pairs)

    def cells(self) -> list[str]:
        rates = [statistics.median(self.undisturbed), statistics.median(self.disturbed)]
        return [self.name, *(f"{rate:.1f}" for rate in rates), f"{self.kept:.2f}"]

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kept": self.kept,
            "undisturbed_tokens_per_second": self.undisturbed,
            "disturbed_tokens_per_second": self.disturbed,
        }


@contextlib.contextmanager
def busy_core(core: int, scratch: Path) -> Iterator[None]:
    """A process that spins on `core` for as long as the context lasts."""
    spin = [sys.executable, "-c", SPIN, str(core)]
    process = start(spin, scratch / "spin.log", stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise PeerError(f"the busy process ended early: {(scratch / 'spin.log').read_text()}")
    finally:
        kill(process)


def measure(
    contenders: list[Contender], model: Path, args: argparse.Namespace, scratch: Path
) -> tuple[list[Case], dict[str, str]]:
    """Every contender and batch, both ways, once a round; and why a contender has no figures."""
    cases = {(one.name, batch): Case(f"{one.name} B={batch}", [], []) for one in contenders
             for batch in BATCHES}  # fmt: skip
    failed: dict[str, str] = {}
    turns = itertools.product(range(args.rounds), contenders, BATCHES)
    try:
        for number, contender, batch in turns:
            if contender.name in failed:
                continue
            progress(f"round {number}: {contender.name} B={batch}")
            workload = Workload(batch, INPUT_TOKENS, args.output_tokens)
            try:
                alone = contender.measure(model, workload, args.seed + number)
                with busy_core(args.core, scratch):
                    crowded = contender.measure(model, workload, args.seed + number)
            except PeerError as error:
                failed[contender.name] = str(error)
                continue
            cases[contender.name, batch].undisturbed.append(alone)
            cases[contender.name, batch].disturbed.append(crowded)
    except KeyboardInterrupt:
        failed["interrupted"] = "these are the figures until then"
    return [case for case in cases.values() if case.disturbed], failed


def run(args: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """The record of one run, printed as a table too."""
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = [Headrace([model], args.threads, scratch)]
        stack.callback(contenders[0].close)
        absent = {}
        try:
            contenders.append(LlamaCppBench(LlamaCpp.find(args.llama_cpp, args.threads, scratch)))
        except PeerError as error:
            absent["llama.cpp"] = str(error)
        cases, failed = measure(contenders, model, args, scratch)
    head = [model.name, "undisturbed, tok/s", f"core {args.core} busy", "kept"]
    print(markdown([head, *(case.cells() for case in cases)]))
    missing = {**absent, **failed}
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    return {
        "command": command("bench.stolen_core", sys.argv[1:]),
        "model": model.name,
        "cpu": probe("cpu").name,
        "threads": args.threads,
        "busy_core": args.core,
        "rounds": args.rounds,
        "versions": {one.name: one.version for one in contenders},
        "cases": [case.json() for case in cases],
        "absent": missing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.stolen_core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = sorted(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--model", default="", help="a .gguf file (default: SmolLM2-135M-Instruct, Q4_1)")
    add("--llama-cpp", type=Path, metavar="DIR", help="its binaries (default: package, then PATH)")
    add("--threads", type=int, default=probe("cpu").cores, help="(default: %(default)s)")
    add("--core", type=int, default=cores[-1], choices=cores, help="the one that is taken")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--output-tokens", type=int, default=48, help="decoded a request (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--save", type=Path, metavar="FILE.json", help="write the figures")
    args = parser.parse_args()
    if args.save and not args.save.absolute().parent.is_dir():
        parser.error(f"--save: there is no folder {args.save.parent}")
    try:
        model = resolve_model(args.model)
        with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="headrace-core-") as name:
            record = run(args, model, Path(name))
    except (HeadraceError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.save:
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
