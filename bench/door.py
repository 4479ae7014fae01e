"""What the door costs: CPU time per streamed token and per request, and time to the first token.

    .venv/bin/python -m bench.door --save bench/results/door.json

A real server with a scripted engine (bench/fake_engine.py, 2 ms a step), alone and behind
`headrace route`, in turn. What is measured of the door is the CPU time of its process: HTTP on both
sides, the journal, the choice, system calls. The loads without a step's length are for the cost of
a request; that of a token holds the share of a request of 256 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.api import CHAT, QUESTION, ROOT, Load, Running, asks, serving
from bench.api_load import run
from bench.peers.processes import PeerError, kill, sigterm_as_interrupt, start
from bench.peers.record import command, markdown

MODEL = "SmolLM2-135M-Instruct"
SWEEP = 0.004  # as bench.api's


def loads() -> list[Load]:
    body = {"model": MODEL, "messages": QUESTION, "stream": True, "ignore_eos": True}
    once = {**body, "stream": False}
    long = {**once, "messages": [{"role": "user", "content": "The water keeps its level. " * 170}]}
    short: dict[str, Any] = {"server": "unpaced", "tokens": 1, "connections": 16}
    return [
        Load("32 streams", CHAT, body, requests=64, connections=32),
        Load("1 token, streamed", CHAT, body, requests=256, **short),
        Load("1 token", CHAT, once, requests=256, **short),
        Load("1 token, prompt of 1k tokens", CHAT, long, requests=256, **short),
    ]


@contextlib.contextmanager
def door_before(replica: Running, core: int, scratch: Path) -> Iterator[Running]:
    """`headrace route` in front of one replica, on a core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(ROOT / part) for part in ("server", "kernels", ""))
    arguments = ["--replica", f"{MODEL}={replica.url}", "--port", str(port)]
    log = scratch / "door.log"
    process = start(
        [sys.executable, "-m", "headrace.cli", "route", *arguments],
        log,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        _wait_for(port, process, log)
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {core})
        yield Running(f"http://127.0.0.1:{port}", process.pid)
    finally:
        kill(process, grace=5.0)


def _wait_for(port: int, process: subprocess.Popen[Any], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as asked:
            asked.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            if b" 200 " in asked.recv(100):
                return
        time.sleep(0.1)
    raise PeerError(f"the door did not start: {log.read_text()[-2000:]}")


def first_token_ms(server: Running, count: int) -> list[float]:
    """Of one stream after the other, on one connection each: until the first event is here."""
    body = json.dumps({**loads()[0].body, "max_tokens": 2}).encode()
    parts = urlsplit(server.url)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    times = []
    for _ in range(count):
        with socket.create_connection((parts.hostname or "", parts.port or 80)) as asked:
            began, seen = time.perf_counter(), b""
            asked.sendall(data)
            while b"data: {" not in seen:
                seen += asked.recv(1 << 16)
            times.append((time.perf_counter() - began) * 1e3)
            while asked.recv(1 << 16):
                pass
    return times


def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One row a load: medians over the rounds, of the door and of the replica behind and alone."""
    os.sched_setaffinity(0, {args.client_core})
    figures: dict[str, dict[str, list[float]]] = {load.name: {} for load in loads()}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, options in (("paced", ["--step-ms", "2"]), ("unpaced", [])):
            (folder := scratch / name).mkdir()
            # On the client's core, so that the door has its own.
            replica = stack.enter_context(serving(ROOT, options, args.client_core, folder))
            door = stack.enter_context(door_before(replica, args.door_core, folder))
            servers[name] = replica, door
        for number in range(args.rounds + 1):
            for load in loads():
                _one_round(load, servers[load.server], args.seed + number, figures[load.name])
            if number == 0:  # caches filled
                figures = {load.name: {} for load in loads()}
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
        ttft = {
            where: statistics.median(first_token_ms(server, args.first_tokens))
            for where, server in zip(("alone", "door"), servers["paced"], strict=True)
        }
    rows = [{"load": name, **_medians(values)} for name, values in figures.items()]
    return [*rows, {"load": "first token, ms", **{k: round(v, 2) for k, v in ttft.items()}}]


def _one_round(
    load: Load, servers: tuple[Running, Running], seed: int, into: dict[str, list[float]]
) -> None:
    replica, door = servers
    pause = SWEEP if load.tokens > 1 else 0.0
    sent = asks(load, seed)
    alone = run(replica.url, replica.pid, sent, load.connections, pause)
    behind = run(door.url, door.pid, sent, load.connections, pause)
    what, count = ("us_per_token", behind.tokens) if load.tokens > 1 else ("us_per_request", 0)
    count = count or behind.requests
    into.setdefault(f"door_{what}", []).append(behind.cpu / count * 1e6)
    into.setdefault(f"replica_alone_{what}", []).append(alone.cpu / count * 1e6)
    into.setdefault("tokens_per_second_of_alone", []).append(alone.wall / behind.wall)


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(found), 3) for name, found in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-tokens", type=int, default=50)
    parser.add_argument("--door-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory() as scratch:
        rows = measure(args, Path(scratch))
    names = [*dict.fromkeys(name for row in rows for name in row)]
    print(markdown([names, *([str(row.get(name, "")) for name in names] for row in rows)]))
    if args.save:
        record = {
            "command": command("bench.door", sys.argv[1:]),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "results": rows,
        }
        args.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
