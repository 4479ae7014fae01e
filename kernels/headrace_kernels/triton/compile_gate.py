"""Compiles what each Triton kernel ships for GPUs that are not here, and gates what comes out.

    python -m headrace_kernels.triton.compile_gate            what changed since the record
    python -m headrace_kernels.triton.compile_gate --all      everything, and more architectures
    ... --write                                               makes the result the new record

A kernel fails the gate if it does not compile, spills (ptxas reports that as stack), asks for more
shared memory than the architecture has, or lacks an instruction that its Build expects. A process
of its own: where Triton interprets, nothing can be compiled. It needs the triton package only:
ptxas and cuobjdump are in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headrace_kernels import verified
from headrace_kernels.dispatch import interprets_triton
from headrace_kernels.triton.builds import ARCHES, Build

FOLDER = Path(__file__).parent
RECORD = FOLDER / "compiled.json"
"""{triton version: {stem: {architecture: {"source": hash, "builds": {name: resources}}}}}"""
MORE_ARCHES = ("sm_89", "sm_120")
KB = 1024
SHARED_LIMITS = {"sm_80": 163 * KB, "sm_89": 99 * KB, "sm_120": 99 * KB}
LARGE_SHARED_LIMIT = 227 * KB  # of sm_90 and sm_100
"""CUDA C++ Programming Guide, table of technical specifications per compute capability."""

Resources = dict[str, int]


@dataclass(frozen=True)
class Unit:
    """One stem on one architecture: what is compiled, and recorded, together."""

    stem: str
    arch: str

    def builds(self) -> list[Build]:
        module = importlib.import_module(f"headrace_kernels.triton.{self.stem}")
        return list(module.builds(self.arch))


def stems() -> list[str]:
    """Modules of this folder that say what they compile."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    return [name for name in names if "\ndef builds(" in (FOLDER / f"{name}.py").read_text()]


def compile_build(build: Build, arch: str) -> tuple[Resources, list[str]]:
    """(registers, stack, shared memory, size) of a build, and what the gate has against it."""
    source = ASTSource(
        fn=build.kernel,
        signature={**build.types, **dict.fromkeys(build.constants, "constexpr")},
        constexprs=dict(build.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(build.kernel.arg_names)
            if build.types.get(name, "").startswith("*")
        },
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    try:
        kernel = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever a pass of the compiler raises
        return {}, [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"]
    used = resource_usage(kernel.asm["cubin"])
    resources = {
        "registers": used["REG"],
        "stack": used["STACK"],
        "shared": int(kernel.metadata.shared),
        "size": len(kernel.asm["cubin"]),
    }
    return resources, list(_objections(build, arch, resources, used["LOCAL"], kernel.asm["ptx"]))


def _objections(
    build: Build, arch: str, resources: Resources, local: int, ptx: str
) -> Iterator[str]:
    if resources["stack"] or local:
        yield f"spills: {resources['stack']} bytes of stack, {local} of local memory"
    if resources["registers"] > build.max_registers:
        yield f"{resources['registers']} registers, more than {build.max_registers}"
    limit = SHARED_LIMITS.get(arch, LARGE_SHARED_LIMIT)
    if resources["shared"] > limit:
        yield f"{resources['shared']} bytes of shared memory, more than {limit}"
    for instruction in build.expects:
        if instruction not in ptx:
            yield f"has no {instruction}"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def compile_unit(unit: Unit) -> tuple[Unit, dict[str, Resources], list[str]]:
    """All builds of a unit: their resources by name, and the objections."""
    found: dict[str, Resources] = {}
    problems = []
    for build in unit.builds():
        resources, objections = compile_build(build, unit.arch)
        found[build.name] = resources
        problems += [f"{unit.stem} {build.name} on {unit.arch}: {text}" for text in objections]
    return unit, found, problems


def stale_units(record: Mapping[str, Any], units: Iterable[Unit]) -> list[Unit]:
    """Units whose sources are not those of the record."""
    return [
        unit
        for unit in units
        if record.get(unit.stem, {}).get(unit.arch, {}).get("source")
        != verified.source_hash("triton", unit.stem)
    ]


def changes(old: Mapping[str, Resources], new: Mapping[str, Resources]) -> Iterator[str]:
    """A line for each build whose resources are not those of the record."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            yield f"{name}: {'new' if before is None else 'gone'}"
            continue
        moved = [
            f"{key} {before.get(key)} -> {value}"
            for key, value in after.items()
            if before.get(key) != value
        ]
        if moved:
            yield f"{name}: {', '.join(moved)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what the record vouches for")
    parser.add_argument("--stem", action="append", help="only this one; may be repeated")
    parser.add_argument("--arch", action="append", help="only this one; may be repeated")
    parser.add_argument("--write", action="store_true", help="make this the new record")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if interprets_triton():
        parser.error("nothing can be compiled under TRITON_INTERPRET=1: unset it")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    own = record.setdefault(triton.__version__, {})
    arches = options.arch or (ARCHES + MORE_ARCHES if options.all else ARCHES)
    units = [Unit(stem, arch) for stem in options.stem or stems() for arch in arches]
    chosen = units if options.all else stale_units(own, units)
    problems = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for unit, found, objections in pool.map(compile_unit, chosen):
            problems += objections
            print(f"{unit.stem} {unit.arch}: {len(found)} compiled", flush=True)
            of_stem = own.setdefault(unit.stem, {})
            for line in changes(of_stem.get(unit.arch, {}).get("builds", {}), found):
                print(f"  {line}")
            if unit.arch in ARCHES and not objections:
                source = verified.source_hash("triton", unit.stem)
                of_stem[unit.arch] = {"source": source, "builds": found}
    if options.write:
        for stem in own.keys() - set(stems()):
            del own[stem]
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"Triton {triton.__version__}: {len(units) - len(chosen)} of {len(units)} as recorded")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
