"""What the way to a replica costs: CPU per token and time to the first one, Ray and the door.

    python -m bench.ray --save bench/results/ray.json

Paths: a 2 ms scripted engine (bench/fake_engine.py) and 32 streams. `headrace serve` alone, a
replica's own port, HAProxy in front of it, the door in front of it. All are up together and
measured in turn. CPU time is that of the API process or replica and of what stands in front, not
the engine's and not the client's.

Model: the default model at 8 and 16 streams, `headrace serve` and `headrace serve-ray` (through
HAProxy) started and ended in turn, so that neither runs beside the other; with the time to ready.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from bench.api_load import Ask, cpu_seconds, run
from bench.peers.processes import PeerError, kill, progress, sigterm_as_interrupt, start
from bench.peers.record import command, markdown

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("ray", "uvicorn", "uvloop", "httptools", "starlette", "fastapi")
MODEL = "SmolLM2-135M-Instruct"
STREAMS, TOKENS, STEP_MS = 32, 128, 2.0
PATHS = ("standalone", "replica", "HAProxy", "door")
OPTIONS = ("--kv-cache-memory-bytes", "256MiB", "--max-model-len", "1024")


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("server", "kernels", ""))
    return {**os.environ, "PYTHONPATH": paths}


def ask(tokens: int) -> Ask:
    body = {"model": MODEL, "prompt": "The water keeps its level.", "max_tokens": tokens}
    data = json.dumps({**body, "stream": True, "ignore_eos": True, "temperature": 0}).encode()
    return Ask.of("/v1/completions", data, tokens, streamed=True)


def asks_of(count: int, seed: int) -> list[Ask]:
    """Lengths vary by a quarter, so that ends, and with them beginnings, do not coincide."""
    lengths = random.Random(seed)
    return [ask(lengths.randint(TOKENS * 3 // 4, TOKENS * 5 // 4)) for _ in range(count)]


@contextlib.contextmanager
def serving(name: str, arguments: Sequence[str], scratch: Path, mark: str) -> Iterator[Any]:
    """A command until it is ready: (process, URL, seconds that it took)."""
    log, out = scratch / f"{name}.log", scratch / f"{name}.out"
    began = time.perf_counter()
    with out.open("wb") as stream:
        module = [sys.executable, "-P", "-m", *arguments]
        process = start(module, log, stdout=stream, cwd=ROOT, env=environment())
    try:
        pattern = mark + r"(http://\S+?)(/v1)?\s"
        while not (found := re.search(pattern, out.read_text() + log.read_text())):
            if process.poll() is not None or time.perf_counter() - began > 300:
                raise PeerError(f"{name} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        _await_ready(found[1])
        yield process, found[1], time.perf_counter() - began
    finally:
        kill(process, grace=60.0)


def _await_ready(url: str) -> None:
    deadline = time.perf_counter() + 60
    while not _is_ready(url):
        if time.perf_counter() > deadline:
            raise PeerError(f"{url}/readyz does not say 200")
        time.sleep(0.05)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# --- paths ------------------------------------------------------------------------------------


def scripted_application(script: str) -> Any:
    """The Ray application whose replicas' engines are scripted."""
    from ray import serve

    from headrace.config import load_options
    from headrace.deploy.ray_serve import Replica, deployment

    class ScriptedReplica(Replica):
        async def __serve_build_asgi_app__(self) -> Any:
            from bench import fake_engine

            from headrace.engine.process_client import ProcessEngineClient

            ProcessEngineClient.engine_program = (str(Path(fake_engine.__file__).resolve()), script)
            return await super().__serve_build_asgi_app__()

    config, options, _ = load_options("", {}, {"log_level": "error"}, {})
    replica = deployment.options(func_or_class=serve.ingress()(ScriptedReplica))
    return replica.bind(config, options)


@contextlib.contextmanager
def ray_with_scripted_replica() -> Iterator[tuple[str, str, int, list[int], float]]:
    """HAProxy's URL, the replica's own, the replica's process, HAProxy's; the seconds that the
    application took until it was ready, of a cluster where Serve ran before."""
    from headrace.deploy import local_cluster, registry
    from headrace.deploy.switches import set_local_switches
    from headrace.listening import listen

    set_local_switches()
    import msgspec
    import ray
    from bench.fake_engine import Answers, script_for
    from ray import serve

    script = msgspec.json.encode(script_for("", Answers(), step_seconds=STEP_MS / 1000)).decode()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    local_cluster._start_ray()
    try:
        quiet = {"log_level": "CRITICAL", "enable_access_log": False}
        http = {"host": "127.0.0.1", "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
        began = time.perf_counter()
        serve.run(scripted_application(script), name="bench", logging_config=quiet)
        actor = registry.open_registry()
        while not (known := ray.get(actor.snapshot.remote())["replicas"]):
            time.sleep(0.1)
        shared = f"http://127.0.0.1:{port}"
        _await_ready(shared)
        ready = time.perf_counter() - began
        children = psutil.Process().children(recursive=True)
        named = [(child.pid, " ".join(child.cmdline()[:2])) for child in children]
        (replica,) = [pid for pid, name in named if "ServeReplica" in name]
        proxies = [pid for pid, name in named if "haproxy" in name.split(" ")[0]]
        yield shared, known[0]["url"], replica, proxies, ready
    finally:
        ray.shutdown()


def measure_paths(rounds: int, scratch: Path) -> dict[str, dict[str, list[float]]]:
    """[path][figure]: a value a round. us are CPU time per token of this path's processes."""
    fake = ["bench.fake_engine", "--step-ms", str(STEP_MS)]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in PATHS}
    with contextlib.ExitStack() as stack:
        alone, alone_url, alone_s = stack.enter_context(serving("standalone", fake, scratch, ""))
        ray = stack.enter_context(ray_with_scripted_replica())
        shared, own, replica, proxies, replica_s = ray
        found["standalone"]["ready_s"] = [alone_s]
        found["HAProxy"]["ready_s"] = [replica_s]
        route = ["headrace.cli", "route", "--replica", f"{MODEL}={own}", "--port", "0"]
        door, door_url, _ = stack.enter_context(serving("door", route, scratch, r"URL\s+"))
        paths = {
            "standalone": (alone_url, [alone.pid], []),
            "replica": (own, [replica], []),
            "HAProxy": (shared, [replica], proxies),
            "door": (door_url, [replica], [door.pid]),
        }
        for number in range(rounds + 1):
            for name, (url, servers, fronts) in paths.items():
                pids = [*servers, *fronts]
                before = [cpu_seconds(pid) for pid in pids]
                asks = asks_of(STREAMS * (8 if number else 2), number)
                cost = run(url, pids[0], asks, STREAMS)
                spent = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
                if number:
                    figures = {
                        "server_us": spent[0] / cost.tokens * 1e6,
                        "front_us": sum(spent[1:]) / cost.tokens * 1e6,
                        "ttft_ms": cost.ttft * 1e3,
                        "tokens_per_second": cost.tokens / cost.wall,
                    }
                    for figure, value in figures.items():
                        found[name].setdefault(figure, []).append(value)
            progress(f"paths: round {number} of {rounds}")
    return found


# --- the model --------------------------------------------------------------------------------


def measure_model(rounds: int, scratch: Path) -> dict[str, dict[str, list[float]]]:
    """[server][figure]: a value a round."""
    servers = {
        "headrace serve": ("serve", r"URL\s+"),
        "headrace serve-ray": ("serve-ray", "on Ray Serve: "),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in servers}
    for number in range(rounds):
        for name, (sub, mark) in servers.items():
            arguments = ["headrace.cli", sub, "--port", "0", *OPTIONS]
            with serving(sub, arguments, scratch, mark) as (process, url, ready):
                figures = {"ready_s": ready}
                run(url, process.pid, [ask(16)] * 8, 8)
                for streams in (8, 16):
                    cost = run(url, process.pid, [ask(96)] * (2 * streams), streams)
                    figures[f"tokens_per_second_{streams}"] = cost.tokens / cost.wall
                    figures[f"ttft_ms_{streams}"] = cost.ttft * 1e3
            for figure, value in figures.items():
                found[name].setdefault(figure, []).append(value)
        progress(f"model: round {number + 1} of {rounds}")
    return found


# --- what comes out ---------------------------------------------------------------------------


def ratio(found: dict[str, dict[str, list[float]]], figure: str) -> float:
    """Through Ray over alone: the median over rounds of the ratio within a round."""
    pairs = zip(found["headrace serve-ray"][figure], found["headrace serve"][figure], strict=True)
    return statistics.median(ours / alone for ours, alone in pairs)


def table(found: dict[str, dict[str, list[float]]]) -> str:
    figures = list(next(iter(found.values())))
    rows = [["", *figures]]
    for name, values in found.items():
        medians = [statistics.median(values.get(figure, [math.nan])) for figure in figures]
        rows.append([name, *(f"{median:.1f}" for median in medians)])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the paths")
    parser.add_argument("--model-rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    parts: dict[str, Any] = {}
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory() as scratch:
        if args.rounds:
            parts["paths"] = measure_paths(args.rounds, Path(scratch))
        if args.model_rounds:
            parts["model"] = found = measure_model(args.model_rounds, Path(scratch))
            parts["ratio"] = {figure: ratio(found, figure) for figure in next(iter(found.values()))}
    for name in ("paths", "model"):
        if name in parts:
            print(table(parts[name]), end="\n\n")
    print({figure: round(value, 3) for figure, value in parts.get("ratio", {}).items()})
    if args.save:
        described = {
            "command": command("bench.ray", sys.argv[1:]),
            "hardware": {"cores": os.cpu_count()},
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
            "load": {"streams": STREAMS, "tokens": TOKENS, "step_ms": STEP_MS},
        }
        args.save.write_text(json.dumps({**described, **parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
