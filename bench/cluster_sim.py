"""A fleet that does not exist: which TTFT, TPOT and goodput do N replicas give, under which policy?

    python -m bench.cluster_sim --replicas 4 --rate 4
    python -m bench.cluster_sim --replicas 1000 --rate 4000 --requests 60000 --policies ours
    python -m bench.cluster_sim --trace mooncake.jsonl --replicas 16 --save out.json --plot out.png

Replicas take the measured time of their steps (bench/step_times.py), schedule and cache as the
engine does, and get their requests from the same choose() as in `headrace route`. "oracle" is the
same with a look into every cache. `--scenarios` runs what bench/results/cluster_sim.json holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.cluster.replica import EngineShape, StepTimes
from bench.cluster.simulation import POLICIES, Cluster, Outcome, Scaler, Simulation
from bench.cluster.traffic import Workload, conversations, trace
from bench.peers.record import can_plot

STEP_TIMES = Path(__file__).parent / "results" / "step_times.json"
Figures = dict[str, float]
ROWS = (
    ("requests", "{:,.0f}"),
    ("prefill_tokens", "{:,.0f}"),
    ("cached_share", "{:.0%}"),
    ("ttft_p50_ms", "{:,.0f}"),
    ("ttft_p99_ms", "{:,.0f}"),
    ("tpot_p50_ms", "{:,.1f}"),
    ("tpot_p99_ms", "{:,.1f}"),
    ("goodput_rps", "{:,.2f}"),
    ("good_share", "{:.0%}"),
    ("busiest_prefill", "{:.2f}"),
    ("busiest_time", "{:.2f}"),
    ("busiest_requests", "{:.2f}"),
    ("busy_share", "{:.0%}"),
    ("preemptions", "{:,.0f}"),
)
SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chats on 4 replicas": ({}, {}),
    "chats on 4 replicas, 4 doors": ({"doors": 4}, {}),
    "chats on 4 replicas, busier": ({}, {"rate": 6.0, "requests": 6000}),
    "chats without system prompts": ({}, {"groups": 0}),
    "one turn, long shared prompts": (
        {},
        {"turns": 1.0, "groups": 32, "system_tokens": 1000, "rate": 6.0},
    ),
    "bursts (gamma 0.3)": ({}, {"burstiness": 0.3}),
    "chats on 16 replicas, 4 doors": (
        {"replicas": 16, "doors": 4},
        {"rate": 24.0, "requests": 12000},
    ),
}
"""Name -> (fields of Cluster, fields of Workload)."""


def load_shape(path: Path, num_blocks: int) -> EngineShape:
    """What bench/step_times.py saved, with so many KV blocks."""
    record = json.loads(path.read_text())
    return EngineShape(
        times=StepTimes(**record["seconds"]),
        num_blocks=num_blocks,
        block_size=record["block_size"],
        max_num_seqs=record["max_num_seqs"],
        max_num_batched_tokens=record["max_num_batched_tokens"],
    )


def simulate(
    cluster: Cluster, workload: Workload | Path, *, seed: int = 0, scaler: Scaler | None = None
) -> Outcome:
    """One run. `scaler`: asked every `scale_every_s` how many replicas there are to be; those that
    come are ready after `start_delay_s`, those that go finish what they have."""
    simulation = Simulation(cluster, scaler)
    if isinstance(workload, Path):
        room = cluster.shape.num_blocks * cluster.shape.block_size // 2
        simulation.start(trace(workload, room))
    else:
        simulation.start(conversations(workload, seed))
    return simulation.run()


def figures(outcome: Outcome, *, slo_ttft: float, slo_tpot: float) -> Figures:
    """What is printed. Goodput: requests a second within both limits (seconds)."""
    jobs, replicas = outcome.jobs, outcome.replicas
    ttfts = sorted(job.first_token - job.arrival for job in jobs)
    tpots = [
        (job.finished - job.first_token) / (job.output_tokens - 1)
        for job in jobs
        if job.output_tokens > 1
    ]
    good = sum(
        job.first_token - job.arrival <= slo_ttft
        and job.finished - job.first_token <= slo_tpot * (job.output_tokens - 1)
        for job in jobs
    )
    seconds = outcome.seconds
    prompt_tokens = sum(job.prompt_tokens for job in jobs)
    prefill_tokens = sum(replica.prefill_tokens for replica in replicas)
    return {
        "requests": len(jobs),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "prefill_tokens": prefill_tokens,
        "cached_share": sum(job.cached for job in jobs) / prompt_tokens,
        "ttft_p50_ms": 1000 * percentile(ttfts, 50),
        "ttft_p99_ms": 1000 * percentile(ttfts, 99),
        "tpot_p50_ms": 1000 * percentile(sorted(tpots), 50),
        "tpot_p99_ms": 1000 * percentile(sorted(tpots), 99),
        "goodput_rps": good / seconds,
        "good_share": good / len(jobs),
        "busiest_prefill": busiest([replica.prefill_tokens for replica in replicas]),
        "busiest_time": busiest([replica.busy_seconds for replica in replicas]),
        "busiest_requests": busiest([replica.requests for replica in replicas]),
        "busy_share": sum(r.busy_seconds for r in replicas) / outcome.replica_seconds,
        "replica_seconds": outcome.replica_seconds,
        "preemptions": sum(replica.preemptions for replica in replicas),
    }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] if ordered else 0.0


def busiest(values: Sequence[float]) -> float:
    """The largest as a multiple of the mean."""
    mean = statistics.fmean(values)
    return max(values) / mean if mean else 1.0


def compare(
    cluster: Cluster, workload: Workload | Path, policies: Sequence[str], args: argparse.Namespace
) -> dict[str, Figures]:
    found = {}
    for policy in policies:
        began = time.perf_counter()
        outcome = simulate(replace(cluster, policy=policy), workload, seed=args.seed)
        found[policy] = figures(outcome, slo_ttft=args.slo_ttft, slo_tpot=args.slo_tpot)
        found[policy]["wall_seconds"] = round(time.perf_counter() - began, 2)
    return found


def table(found: dict[str, Figures]) -> str:
    width = max(map(len, found)) + 2
    lines = [" " * 18 + "".join(f"{policy:>{width}}" for policy in found)]
    for name, form in ROWS:
        cells = "".join(f"{form.format(value[name]):>{width}}" for value in found.values())
        lines.append(f"{name:<18}{cells}")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Figures]], path: Path) -> None:
    """A row for each scenario: prefill tokens, TTFT and balance by policy. PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("prefill_tokens", "ttft_p50_ms", "ttft_p99_ms", "busiest_prefill")
    size = (4.2 * len(shown), 2.8 * len(results))
    figure, panels = pyplot.subplots(len(results), len(shown), figsize=size, squeeze=False)
    for row, (title, found) in zip(panels, results.items(), strict=True):
        for panel, name in zip(row, shown, strict=True):
            bars = panel.barh(list(found), [value[name] for value in found.values()])
            panel.bar_label(bars, fmt="{:,.2f}" if name.startswith("b") else "{:,.0f}", fontsize=7)
            panel.invert_yaxis()
            panel.set_title(f"{title}: {name}", fontsize=8)
            panel.margins(x=0.2)
            panel.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=72)
    pyplot.close(figure)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--replicas", type=int, default=4)
    add("--doors", type=int, default=1, help="front doors, each with an index of its own")
    add("--policies", default=",".join(POLICIES), help="separated by commas (default: all)")
    add("--poll", type=float, default=0.5, help="seconds between a door's two looks at a load")
    add("--num-blocks", type=int, default=4096, help="KV blocks of a replica")
    add("--step-times", type=Path, default=STEP_TIMES, help="of bench/step_times.py")
    add("--trace", type=Path, help="JSONL: timestamp, input_length, output_length, hash_ids")
    for name, value in asdict(Workload()).items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value)
    add("--slo-ttft", type=float, default=1.0, help="seconds")
    add("--slo-tpot", type=float, default=0.1, help="seconds")
    add("--seed", type=int, default=0)
    add("--scenarios", action="store_true", help="all that the saved results hold")
    add("--save", type=Path, help="write the figures to this JSON file")
    add("--plot", type=Path, help="draw them into this PNG file; needs matplotlib")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.plot and not can_plot():
        parser.error("--plot needs matplotlib: pip install -c constraints.txt 'headrace[peers]'")
    base = Cluster(
        shape=load_shape(args.step_times, args.num_blocks),
        replicas=args.replicas,
        doors=args.doors,
        poll_s=args.poll,
    )
    workload = Workload(**{name: getattr(args, name) for name in asdict(Workload())})
    runs: dict[str, tuple[Cluster, Workload | Path]]
    if args.scenarios:
        runs = {
            name: (replace(base, **ours), replace(workload, **theirs))
            for name, (ours, theirs) in SCENARIOS.items()
        }
    else:
        runs = {f"{args.replicas} replicas": (base, args.trace or workload)}
    results = {}
    for name, (cluster, asked) in runs.items():
        results[name] = compare(cluster, asked, args.policies.split(","), args)
        print(f"\n{name}\n{table(results[name])}", flush=True)
    if args.save:
        record = {
            "command": "python -m bench.cluster_sim --scenarios --save PATH"
            if args.scenarios
            else "python -m bench.cluster_sim",
            "seed": args.seed,
            "num_blocks": args.num_blocks,
            "step_times": json.loads(args.step_times.read_text())["seconds"],
            "runs": {
                name: {
                    "cluster": {"replicas": cluster.replicas, "doors": cluster.doors},
                    "workload": str(asked) if isinstance(asked, Path) else asdict(asked),
                    "figures": {
                        policy: {key: round(value, 4) for key, value in found.items()}
                        for policy, found in results[name].items()
                    },
                }
                for name, (cluster, asked) in runs.items()
            },
        }
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
