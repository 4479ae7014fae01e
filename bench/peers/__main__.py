"""The same work on Headrace, llama.cpp and vLLM, interleaved.

    .venv/bin/python -m bench.peers --save bench/results/peers.json

Every contender computes the same batches from the same GGUF file (vLLM: its weights in bf16) with
the same number of threads, and two servers answer the same clients. In each round every
measurement is made once with every contender, one after the other, while the others stand still.
Printed are medians over the rounds and how many times better Headrace is (the median of the
ratios within a round). llama.cpp and vLLM take part where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import record
from bench.peers.comparison import Comparison, Settings
from bench.peers.contenders import Headrace
from bench.peers.http_load import Load
from bench.peers.processes import sigterm_as_interrupt

from headrace.engine.hardware import probe
from headrace.errors import HeadraceError
from headrace.loading.resolver import resolve_model

SKIPPABLE = ("llama.cpp", "vllm", "q4_0", "http")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with a message for those that cannot work, before anything runs."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="", help="a .gguf file (default: SmolLM2-135M-Instruct, Q4_1)")
    add("--llama-cpp", type=Path, metavar="DIR", help="its binaries (default: package, then PATH)")
    add("--vllm-python", type=Path, metavar="FILE", help="the Python of an environment with vllm")
    add("--threads", type=int, default=probe("cpu").cores, help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--output-tokens", type=int, default=48, help="decoded a request (default: %(default)s)")
    add("--http-clients", type=int, default=16, help="(default: %(default)s)")
    add("--http-requests", type=int, default=48, help="of all clients (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--skip", action="append", default=[], choices=SKIPPABLE, help="may be repeated")
    add("--work-dir", type=Path, metavar="DIR", help="keep converted models for the next run")
    add("--save", type=Path, metavar="FILE.json", help="write the figures, and FILE.png")
    add("--no-plot", action="store_true", help="no FILE.png")
    args = parser.parse_args(arguments)
    for name in ("threads", "rounds", "output_tokens", "http_clients", "http_requests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("save", "work_dir"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name.replace('_', '-')}: there is no folder {path.parent}")
    if args.save and args.save.suffix != ".json":
        parser.error(f"--save takes FILE.json, got {args.save}")
    if args.save and not args.no_plot and not record.can_plot():
        parser.error(record.PLOT_REMEDY)
    return args


def main() -> int:
    args = parse()
    try:
        model = resolve_model(args.model)
    except HeadraceError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    if args.work_dir:
        args.work_dir.mkdir(exist_ok=True)
    with (
        sigterm_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="headrace-peers-") as name,
        contextlib.closing(Comparison(_settings(args, model, Path(name)))) as comparison,
    ):
        try:
            comparison.prepare()
            for number in range(args.rounds):
                comparison.round(number)
            status = 0
        except KeyboardInterrupt:
            comparison.notes["interrupted"] = "these are the figures until then"
            status = 130
        comparison.set_limits()  # while the converted files are there
    _tell(comparison, args)
    return status


def _tell(comparison: Comparison, args: argparse.Namespace) -> None:
    print(report(comparison))
    if not args.save:
        return
    content = as_json(comparison, args, sys.argv[1:])
    args.save.write_text(json.dumps(content, indent=2) + "\n")
    if not args.no_plot and any(measures.values for measures in comparison.measures):
        caption = (
            f"{content['hardware']['cpu']}, {args.threads} threads, {content['date']}; "
            f"medians of {args.rounds} rounds"
        )
        record.plot(comparison.measures, args.save.with_suffix(".png"), caption)


def _settings(args: argparse.Namespace, model: Path, scratch: Path) -> Settings:
    return Settings(
        model=model,
        threads=args.threads,
        output_tokens=args.output_tokens,
        seed=args.seed,
        load=Load(clients=args.http_clients, requests=args.http_requests),
        skip=args.skip,
        llama_cpp=args.llama_cpp,
        vllm_python=args.vllm_python,
        work=args.work_dir or scratch,
        scratch=scratch,
    )


def report(comparison: Comparison) -> str:
    """Tables, ceilings, and a line for each thing that is missing."""
    lines = [
        f"tok/s unless said otherwise, {comparison.settings.threads} threads; "
        "a ratio above 1 is in Headrace's favour",
    ]
    for measures in comparison.measures:
        lines += ["", measures.table()]
    if ceilings := comparison.median_ceilings():
        told = ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items())
        lines += ["", f"ceilings of this run: {told}"]
    missing = {**comparison.absent, **comparison.notes}
    if missing:
        lines += ["", *(f"{name}: {reason}" for name, reason in missing.items())]
    return "\n".join(lines)


def as_json(
    comparison: Comparison, args: argparse.Namespace, arguments: list[str]
) -> dict[str, Any]:
    """All that the run found, with what it takes to repeat it."""
    hardware = probe("cpu")
    return {
        "command": record.command("bench.peers", arguments),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": {
            "cpu": hardware.name,
            "cores": hardware.cores,
            "memory_bytes_free": hardware.memory_bytes,
            "system": platform.platform(),
        },
        "python": platform.python_version(),
        "versions": {one.name: one.version for one in comparison.contenders},
        "kernels": next(
            (dict(one.kernels) for one in comparison.contenders if isinstance(one, Headrace)), {}
        ),
        "threads": args.threads,
        "rounds": args.rounds,
        "seed": args.seed,
        "http": vars(comparison.settings.load),
        "ceilings": {
            name: {"median": value, "rounds": comparison.ceilings[name]}
            for name, value in comparison.median_ceilings().items()
        },
        "models": [measures.json() for measures in comparison.measures],
        "absent": comparison.absent,
        "notes": comparison.notes,
    }


if __name__ == "__main__":
    sys.exit(main())
