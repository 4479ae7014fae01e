"""Compiles csrc/cuda for GPUs that are not here, and gates what comes out.

    python -m headrace_kernels.cuda.compile_gate            if the sources changed since the record
    python -m headrace_kernels.cuda.compile_gate --all      in any case
    ... --write                                             makes the result the new record

A kernel fails the gate if it does not compile, uses stack or spills, or lacks an instruction that
it is written around. Needs nvcc and the headers of torch; the disassembler is the triton package's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.utils import cpp_extension

from headrace_kernels.cuda import nvcc

RECORD = Path(__file__).parent / "compiled.json"
"""{nvcc version: {target: {"source": digest, "kernels": {name: resources}}}}"""
ROOT = Path(__file__).parents[3]
EXPECTED: Mapping[str, tuple[str, ...]] = {
    # Products of matrices, their operands as matrices, and copies that nobody waits for.
    "decode_attention": ("HMMA.16816", "LDSM.16", "LDGSTS.E.BYPASS"),
    "packed_linear": ("HMMA.16816", "LDGSTS.E.BYPASS"),
    "packed_linear_wide": ("HMMA.16816", "LDGSTS.E.BYPASS"),
    "copy_blocks": ("LDG.E.128", "STG.E.128"),
    "quantize_groups": ("LDG.E.128", "STG.E.64"),
}
"""Instructions (SASS) of kernels."""
WITH_BOUNDS = ("decode_attention", "packed_linear", "packed_linear_wide")
"""Kernels whose launch bounds ptxas keeps to; the registers of others are few."""
MANY_REGISTERS = 128

Resources = dict[str, int]
_FUNCTION = re.compile(
    r"Compiling entry function '(\S+)' for.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:, used \d+ barriers)?(?:.*?(\d+) bytes smem)?",
    re.DOTALL,
)


def read_resources(log: str) -> dict[str, Resources]:
    """What ptxas says of each kernel, by its mangled name."""
    found = {}
    for part in log.split("Compiling entry")[1:]:
        match = _FUNCTION.match("Compiling entry" + part)
        assert match is not None, part
        name, stack, stores, loads, registers, shared = match.groups()
        found[name] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "shared": int(shared or 0),
        }
    return found


def readable(names: list[str]) -> dict[str, str]:
    """decode_attention<128, false, bf16, e4m3>, by the mangled name."""
    run = subprocess.run(
        ["c++filt", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = (
        re.sub(r"headrace::cuda::|^void |\(.*", "", re.sub(r"\((\w+)\)(?=[\w-])", "", name))
        for name in run
    )
    return dict(zip(names, short, strict=True))


def instructions(object_file: Path) -> dict[str, str]:
    """The disassembly of each kernel, by its mangled name."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command: list[str | Path] = [tool, "--dump-sass", object_file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = (part.split(None, 1) for part in text.split("Function : ")[1:])
    return {name: code for name, code in functions}


def objections(name: str, resources: Resources, code: str) -> Iterator[str]:
    if resources["stack"] or resources["spills"]:
        yield f"{resources['stack']} bytes of stack, {resources['spills']} spilled"
    kernel = name.partition("<")[0]
    if kernel not in WITH_BOUNDS and resources["registers"] > MANY_REGISTERS:
        yield f"{resources['registers']} registers, more than {MANY_REGISTERS}"
    for instruction in EXPECTED.get(kernel, ()):
        if instruction not in code:
            yield f"has no {instruction}"


def compile_target(compiler: nvcc.Compiler, jobs: int) -> tuple[dict[str, Resources], list[str]]:
    """Resources of the kernels by name, and what the gate has against them."""
    kernels, problems = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for path, log in compiler.compile_all(Path(folder), jobs).items():
            found = read_resources(log)
            code = instructions(path) if found else {}
            names = readable(list(found)) if found else {}
            for mangled, resources in found.items():
                name = names[mangled]
                kernels[name] = resources
                problems += [
                    f"{name}: {text}" for text in objections(name, resources, code[mangled])
                ]
    return kernels, problems


def changes(old: Mapping[str, Resources], new: Mapping[str, Resources]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what the record vouches for")
    parser.add_argument("--target", action="append", help="only this one, such as 90a")
    parser.add_argument("--write", action="store_true", help="make this the new record")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    found = nvcc.find()
    if found is None:
        parser.error("there is no nvcc on the path")
    version, source = nvcc.version(found), nvcc.digest(ROOT)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    own = record.setdefault(version, {})
    failed = False
    for target in options.target or nvcc.TARGETS:
        old = own.get(target, {})
        if old.get("source") == source and not options.all:
            print(f"sm_{target}: as recorded")
            continue
        compiler = nvcc.Compiler(
            nvcc=found,
            root=ROOT,
            targets=(target,),
            includes=[*cpp_extension.include_paths(), sysconfig.get_path("include")],
            macros=["TORCH_TARGET_VERSION=0x020b000000000000"],
        )
        try:
            kernels, problems = compile_target(compiler, options.jobs)
        except subprocess.CalledProcessError as error:
            kernels, problems = {}, [f"does not compile: {error.stderr}"]
        print(f"sm_{target}: {len(kernels)} kernels, {len(problems)} problems", flush=True)
        for line in changes(old.get("kernels", {}), kernels):
            print(f"  {line}")
        for problem in problems:
            failed = True
            print(f"sm_{target} {problem}", file=sys.stderr)
        if not problems:
            own[target] = {"source": source, "kernels": kernels}
    if options.write:
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
