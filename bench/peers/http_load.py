"""Servers under the same load over HTTP: start to first token, throughput, TTFT and TPOT."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.contenders import headrace_environment
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.processes import PeerError, kill, start

SERVED_NAME = "peer"
START_TIMEOUT = 120.0  # s until the first token
POLL = 0.01  # s between attempts at the first request
GRACE = 10.0  # s to shut down

OUTPUT_RATE, TTFT, TPOT, START = (
    "HTTP output tok/s",
    "HTTP median TTFT ms",
    "HTTP median TPOT ms",
    "start to first token s",
)
MEASURES = (OUTPUT_RATE, TTFT, TPOT, START)


@dataclass(frozen=True)
class Load:
    """`clients` send one request after the other, `requests` in all; every prompt is its own."""

    clients: int = 16
    requests: int = 48
    input_len: int = 128
    output_len: int = 128


@dataclass(frozen=True)
class Server:
    """How one contender's server is started; {port} in the command stands for a free port."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    counts_itself: bool
    """Its /metrics can be held against the client's account."""


def headrace_server(model: Path, threads: int) -> Server:
    command = [
        *(sys.executable, "-m", "headrace.cli", "serve", str(model)),
        *("--port", "{port}", "--threads", str(threads)),
        *("--served-model-name", SERVED_NAME, "--log-level", "warning"),
    ]
    return Server("headrace", command, headrace_environment(), counts_itself=True)


def llama_server(llama_cpp: LlamaCpp, model: Path, load: Load) -> Server:
    """Twice the context that a request needs, so that no slot is short of room."""
    context = 2 * (load.input_len + load.output_len)
    command = llama_cpp.server_command(model, 0, load.clients, context)
    command[command.index("--port") + 1] = "{port}"
    return Server("llama.cpp", [*command, "--alias", SERVED_NAME], llama_cpp.env, False)


def measure(server: Server, load: Load, seed: int, scratch: Path) -> tuple[dict[str, float], str]:
    """MEASURES of one start of the server, and a note where requests failed. Raises PeerError."""
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in server.command]
    log = scratch / f"{server.name}-server.log"
    begin = time.perf_counter()
    process = start(
        command, log, env=dict(server.env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        seconds = _first_token(process, port, log) - begin
        result = _load(server, load, port, seed, scratch)
    finally:
        kill(process, GRACE)
    if not result["completed"]:
        raise PeerError(f"{server.name} answered no request: {result['first_error']}")
    note = ""
    if result["failed"]:
        note = f"{result['failed']} of {load.requests} requests failed: {result['first_error']}"
    elif server.counts_itself and result["disagreements"]:
        note = f"the server counts otherwise: {result['disagreements'][0]}"
    return {
        OUTPUT_RATE: result["output_throughput"],
        TTFT: result["median_ttft_ms"],
        TPOT: result["median_tpot_ms"],
        START: seconds,
    }, note


def _first_token(process: subprocess.Popen[Any], port: int, log: Path) -> float:
    """When the first token of the first request came, by time.perf_counter."""
    body = json.dumps(
        {
            "model": SERVED_NAME,
            "prompt": list(range(1000, 1016)),
            "max_tokens": 2,
            "temperature": 0,
            "stream": True,
        }
    )
    end = time.perf_counter() + START_TIMEOUT
    problem = "no connection"
    while time.perf_counter() < end:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            raise PeerError(f"the server exited {process.returncode}: {' | '.join(lines[-6:])}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status == 200:
                while line := response.readline():
                    if line.startswith(b"data: {"):
                        return time.perf_counter()
            problem = f"HTTP {response.status}: {response.read(200)!r}"
        time.sleep(POLL)
    raise PeerError(f"no token within {START_TIMEOUT:.0f} s of the start: {problem}")


def _load(server: Server, load: Load, port: int, seed: int, scratch: Path) -> dict[str, Any]:
    """What `headrace bench serve` found, as its JSON."""
    result = scratch / f"{server.name}-load.json"
    result.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "headrace.cli", "bench", "serve"),
        *("--base-url", f"http://127.0.0.1:{port}", "--model", SERVED_NAME),
        *("--input-len", str(load.input_len), "--output-len", str(load.output_len)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.clients)),
        *("--seed", str(seed), "--ignore-eos", "--temperature", "0"),
        *("--save-result", str(result)),
        *([] if server.counts_itself else ["--no-server-check"]),
    ]
    log = scratch / f"{server.name}-load.log"
    process = start(command, log, env=headrace_environment(), stdout=subprocess.DEVNULL)
    try:
        process.wait(1200)
    except subprocess.TimeoutExpired:
        raise PeerError(f"the load on {server.name} took longer than 20 minutes") from None
    finally:
        kill(process)
    if not result.exists():  # failed requests are in the file too
        lines = log.read_text(errors="replace").splitlines()
        raise PeerError(f"headrace bench serve: {' | '.join(lines[-3:])}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
