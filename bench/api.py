"""What the API process costs: CPU time per streamed token and per request, and tokens/s per core.

    .venv/bin/python -m bench.api --save bench/results/api.json

The server is the real one, pinned to a core; its engine is scripted (bench/fake_engine.py) and
shares another core with the client. What is measured is the CPU time of the API process: HTTP,
tokenizer, template, the wire, detokenizer, JSON, events, metrics, system calls.

Most loads are paced: 256 streams at 8 ms a step, so that every token is an event and a write of
its own. "twice what is promised" offers 85,000 tok/s: what waits when the process comes to it is
written together. Costs per token hold the share of a request of 256 tokens.

--against DIR measures another checkout in turn with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.api_load import Ask, Cost, run
from bench.peers.processes import PeerError, kill, sigterm_as_interrupt, start
from bench.peers.record import command, markdown

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("uvicorn", "uvloop", "httptools", "starlette", "fastapi", "pydantic", "msgspec")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SWEEP = 0.004  # seconds between two looks of the client at hundreds of streams
THOUGHT, CALLED = 1, 2  # seeds of scripted answers
ANSWERS = {
    THOUGHT: "<think>"
    + "Let me see what the water does before it turns the wheel. " * 6
    + "</think>"
    + "It keeps its level along the slope. " * 60,
    CALLED: "Let me look that up.\n<tool_call>\n"
    + json.dumps(
        {"name": "level", "arguments": {"places": [f"mill {i} of the valley" for i in range(200)]}}
    )
    + "\n</tool_call>",
}
TOOL = {
    "type": "function",
    "function": {"name": "level", "parameters": {"type": "object", "properties": {}}},
}
QUESTION = [{"role": "user", "content": "How does the water get to the mill?"}]


@dataclass(frozen=True)
class Load:
    """`tokens` per request on average; lengths vary by a quarter, so that ends do not coincide."""

    name: str
    path: str
    body: dict[str, Any]
    server: str = "paced"
    tokens: int = 256
    requests: int = 512
    connections: int = 256
    headers: str = ""


def loads() -> list[Load]:
    chat = {"messages": QUESTION, "stream": True, "ignore_eos": True}
    text = {"prompt": QUESTION[0]["content"], "stream": True, "ignore_eos": True}
    long = {"prompt": "The water keeps its level. " * 170, "stream": True}
    top = {"logprobs": True, "top_logprobs": 5}
    tools = {"tools": [TOOL], "parallel_tool_calls": False, "seed": CALLED}
    short: dict[str, Any] = {"server": "unpaced", "tokens": 1, "requests": 512, "connections": 16}
    return [
        Load("chat stream", CHAT, chat),
        Load("chat stream, journaled", CHAT, chat, headers="headrace-journal: 1\r\n"),
        Load("completions stream", COMPLETIONS, text),
        Load("chat stream, logprobs of 5", CHAT, {**chat, **top}),
        Load("chat stream, tools read", CHAT, {**chat, **tools}),
        Load("chat stream, reasoning read", CHAT, {**chat, "seed": THOUGHT}, "thinks"),
        Load("chat, not streamed", CHAT, {**chat, "stream": False}),
        Load("chat stream, twice what is promised", CHAT, chat, "twice", requests=1024),
        Load("1 token, chat stream", CHAT, chat, **short),
        Load("1 token, chat", CHAT, {**chat, "stream": False}, **short),
        Load("1 token, completions stream", COMPLETIONS, text, **short),
        Load("1 token, prompt of 1k tokens", COMPLETIONS, long, **short),
    ]


SERVERS: dict[str, list[str]] = {
    "paced": ["--step-ms", "8", "--option", "tool_call_parser=hermes"],
    "thinks": ["--step-ms", "8", "--option", "reasoning_parser=think"],
    "twice": ["--step-ms", "3"],
    "unpaced": [],
}


def asks(load: Load, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    spread = load.tokens // 4
    made = []
    for _ in range(load.requests):
        tokens = load.tokens + rng.randint(-spread, spread)
        body = json.dumps({**load.body, "max_tokens": tokens}).encode()
        made.append(
            Ask.of(load.path, body, tokens, streamed=load.body["stream"], headers=load.headers)
        )
    return made


# --- servers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    url: str
    pid: int


@contextlib.contextmanager
def serving(tree: Path, options: Sequence[str], core: int, scratch: Path) -> Iterator[Running]:
    """The server of a checkout. Its API process runs on `core`, its engine where this one does."""
    path = os.pathsep.join(str(tree / part) for part in ("server", "kernels", ""))
    arguments = ["--option", f"data_dir={scratch / 'data'}", *options]
    for seed, answer in ANSWERS.items():
        arguments += ["--answer-of", f"{seed}={answer}"]
    log = scratch / "server.log"
    process = start(
        [sys.executable, "-m", "bench.fake_engine", *arguments],
        log,
        stdout=subprocess.PIPE,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        if not url:
            raise PeerError(f"the server did not start: {log.read_text()[-2000:]}")
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {core})
        yield Running(url, process.pid)
    finally:
        kill(process, grace=5.0)


# --- what comes out ---------------------------------------------------------------------------


@dataclass
class Measured:
    load: str
    tree: str
    tokens_per_request: int
    costs: list[Cost] = field(default_factory=list)

    @property
    def us_per_token(self) -> list[float]:
        return [cost.cpu / cost.tokens * 1e6 for cost in self.costs]

    @property
    def us_per_request(self) -> list[float]:
        return [cost.cpu / cost.requests * 1e6 for cost in self.costs]

    @property
    def tokens_per_second(self) -> list[float]:
        return [cost.tokens / cost.wall for cost in self.costs]

    @property
    def busy(self) -> list[float]:
        """Part of its core that the API process had."""
        return [cost.cpu / cost.wall for cost in self.costs]

    def json(self) -> dict[str, Any]:
        figures = ("us_per_token", "us_per_request", "tokens_per_second", "busy")
        return {
            "load": self.load,
            "tree": self.tree,
            "tokens_per_request": self.tokens_per_request,
            **{
                name: {
                    "median": round(statistics.median(values), 3),
                    "min": round(min(values), 3),
                    "max": round(max(values), 3),
                }
                for name in figures
                if (values := getattr(self, name))
            },
            "rounds": [asdict(cost) for cost in self.costs],
        }


def table(results: Sequence[Measured]) -> str:
    rows = [["load", "us/token", "min", "us/request", "min", "tok/s", "busy"]]
    for result in results:
        if not result.costs:
            continue
        medians = [
            statistics.median(values)
            for values in (result.us_per_token, result.us_per_request, result.tokens_per_second)
        ]
        one = result.tokens_per_request == 1
        name = result.load + (f" ({result.tree})" if result.tree else "")
        rows.append(
            [
                name,
                "" if one else f"{medians[0]:.1f}",
                "" if one else f"{min(result.us_per_token):.1f}",
                f"{medians[1]:.0f}" if one else "",
                f"{min(result.us_per_request):.0f}" if one else "",
                "" if one else f"{medians[2]:,.0f}",
                f"{statistics.median(result.busy):.2f}",
            ]
        )
    return markdown(rows)


def _commit(tree: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def record(args: argparse.Namespace, results: Sequence[Measured]) -> dict[str, Any]:
    return {
        "command": command("bench.api", sys.argv[1:]),
        "commit": _commit(ROOT),
        "hardware": {"cpu": _cpu_model(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "seed": args.seed,
        "pinned": {"api": args.api_core, "client and engine": args.client_core},
        "results": [result.json() for result in results if result.costs],
    }


def measure(args: argparse.Namespace, trees: dict[str, Path], scratch: Path) -> list[Measured]:
    chosen = [load for load in loads() if re.search(args.only, load.name)]
    results = {
        (load.name, label): Measured(load.name, label, load.tokens)
        for load in chosen
        for label in trees
    }
    os.sched_setaffinity(0, {args.client_core})
    with contextlib.ExitStack() as stack:
        servers = {}
        for label, tree in trees.items():
            for name in {load.server for load in chosen}:
                folder = scratch / f"{name}-{label or 'this'}"
                folder.mkdir()
                servers[name, label] = stack.enter_context(
                    serving(tree, SERVERS[name], args.api_core, folder)
                )
        for number in range(args.rounds + 1):
            for load in chosen:
                for label in trees:
                    server = servers[load.server, label]
                    sent = asks(load, args.seed + number)
                    if number == 0:  # caches fill
                        sent = sent[: load.connections]
                    pause = SWEEP if load.tokens > 1 else 0.0
                    cost = run(server.url, server.pid, sent, load.connections, pause)
                    if number:
                        results[load.name, label].costs.append(cost)
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    return list(results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="loads in whose name this regex is found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    trees = {"": ROOT}
    if args.against:
        trees["other"] = args.against.resolve()
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory() as scratch:
        results = measure(args, trees, Path(scratch))
    print(table(results))
    if args.save:
        args.save.write_text(json.dumps(record(args, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
