"""Checks and measures Headrace on the GPU of this machine, without installing anything.

    PYTHONPATH=server:kernels python3 bench/gpu.py                  every stage
    PYTHONPATH=server:kernels python3 bench/gpu.py check kernels    some of them
    PYTHONPATH=server:kernels TRITON_INTERPRET=1 python3 bench/gpu.py --dry-run    on a CPU, tiny

Stages: `check` holds every kernel against its reference and writes verified.json, which is what
lets dispatch choose it; `kernels` times each against its limit and against other libraries;
`engine` asks whether requests alone, batched, after cache hits and preempted get the same bits, and
runs the engine end to end on random weights of real shapes; `peers` runs the same on other engines
that can be imported. Each ends within --budget seconds, writes its JSON after every case,
and when it is started again goes on with the cases that are missing. Needs torch, triton and numpy;
transformers for `peers`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.gpu_stages import check, engine, invariance, kernels, peers  # noqa: E402
from bench.gpu_stages.machine import Machine  # noqa: E402
from bench.gpu_stages.record import Case, Record  # noqa: E402


def _engine_cases(machine: Machine) -> Iterator[Case]:
    yield from invariance.cases(machine)
    yield from engine.cases(machine)


STAGES: dict[str, Callable[[Machine], Iterator[Case]]] = {
    "check": check.cases,
    "kernels": kernels.cases,
    "engine": _engine_cases,
    "peers": peers.cases,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--again", action="store_true", help="also cases that are in the record")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="", help="what runs, where there is no git to ask")
    parser.add_argument("--no-build", action="store_true", help="leave CUDA C++ as it is")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    options = parser.parse_args()
    if unknown := set(options.stages) - STAGES.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    machine = Machine.find(dry_run=options.dry_run, seed=options.seed)
    if isinstance(machine, str):
        parser.error(machine)
    if not machine.dry_run and not options.no_build:
        machine.build_cuda_kernels(ROOT)
    record = Record.open(options.out, machine.describe(ROOT, options.commit))
    for name in options.stages or STAGES:
        cases: Iterator[Case] = STAGES[name](machine)
        record.run(name, cases, only=options.only, again=options.again, budget=options.budget)
        if name == "check":
            check.vouch(machine, record)
    print(record.table(options.stages or list(STAGES)))
    return 1 if record.failures(options.stages or list(STAGES)) else 0


if __name__ == "__main__":
    sys.exit(main())
