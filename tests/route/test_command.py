"""`headrace route` as a process: its start, its signals, several of it on one port."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.e2e.conftest import _environment, free_port
from tests.route.scripted import PATIENCE, TEXT, Got, Replica, Request, ask, get, post, reply

from headrace.errors import ConfigError
from headrace.route.command import route

CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}


@asynccontextmanager
async def running(log: Path, *arguments: object, **more: str) -> AsyncIterator[tuple[Any, int]]:
    """`headrace route`, and its port, once it is ready. more: variables of its environment."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "headrace.cli", "route", *map(str, arguments)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**_environment(), **more},
            stdout=output,
            stderr=output,
        )
    try:
        await until(port, get("/readyz"), 200)
        yield process, port
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


async def until(port: int, data: bytes, status: int) -> Got:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if (got := await ask(port, data)).status == status:
                    return got
            except (OSError, asyncio.IncompleteReadError):
                pass
            await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
async def test_start_reread_and_end(tmp_path: Path, processes: int) -> None:
    replica = Replica()
    await replica.start()
    file, log = tmp_path / "route.yaml", tmp_path / "log"
    content: dict[str, Any] = {"models": {"llama": {"replicas": [replica.url]}}}
    file.write_text(yaml.safe_dump({**content, "processes": processes}))
    async with running(log, file) as (process, port):
        assert (await ask(port, post(CHAT))).json["choices"][0]["message"]["content"] == TEXT
        content["models"]["llama"]["aliases"] = ["gpt"]
        file.write_text(yaml.safe_dump(content))
        process.send_signal(signal.SIGHUP)
        await until(port, post({**CHAT, "model": "gpt"}), 200)
        file.write_text("models: {llama: {replica: []}}")
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE):
            while "The configuration stays as it is" not in log.read_text():
                await asyncio.sleep(0.05)
        assert (await until(port, post({**CHAT, "model": "gpt"}), 200)).json
    assert ("llama: 1 of 1 replicas ready" if processes == 1 else "llama: 1 replica") in (
        log.read_text()
    )
    replica.kill()


@pytest.mark.slow
async def test_several_processes_share_a_port_and_their_metrics(tmp_path: Path) -> None:
    replica = Replica()
    await replica.start()
    arguments = (f"--replica=llama={replica.url}", "--processes", 2)
    async with running(tmp_path / "log", *arguments) as (process, port):
        parent = psutil.Process(process.pid)
        doors = parent.children()
        assert len(doors) == 2
        for _ in range(20):
            await until(port, post(CHAT), 200)
        counted = 'headrace_door_requests_total{model_name="llama",status="200"} 20.0'
        for _ in range(4):
            assert counted in (await until(port, get("/metrics"), 200)).body.decode()
        doors[0].kill()
        async with asyncio.timeout(PATIENCE):
            while len(parent.children()) < 2 or doors[0] in parent.children():
                await asyncio.sleep(0.05)
        assert counted in (await until(port, get("/metrics"), 200)).body.decode()
    replica.kill()


@pytest.mark.slow
async def test_the_first_signal_may_reach_every_process(tmp_path: Path) -> None:
    """As a supervisor sends it, which ends a whole control group."""
    release = asyncio.Event()

    async def slow(replica: Replica, request: Request, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await reply(writer, 200, {"done": True})

    replica = Replica(slow)
    await replica.start()
    arguments = (f"--replica=llama={replica.url}", "--processes", 2)
    log = tmp_path / "log"
    async with running(log, *arguments, HEADRACE_API_KEY="k") as (process, port):
        assert (await ask(port, post(CHAT))).status == 401
        doors = psutil.Process(process.pid).children()
        async with asyncio.timeout(PATIENCE):
            while not all(door.net_connections("tcp") for door in doors):
                await asyncio.sleep(0.05)
        request = post(CHAT, more="authorization: Bearer k\r\n")
        asked = asyncio.create_task(ask(port, request))
        async with asyncio.timeout(PATIENCE):
            while not replica.requests:
                await asyncio.sleep(0.05)
        for door in (*doors, *doors):
            door.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert not asked.done()
        release.set()
        assert (await asked).json == {"done": True}
    assert "ending now" not in log.read_text()
    replica.kill()


@pytest.mark.parametrize("flag", ["llama", "llama=ftp://x", "llama=http://x/v1", "=http://x"])
def test_wrong_addresses_are_told(flag: str) -> None:
    with pytest.raises(ConfigError, match="NAME=URL|http://HOST:PORT"):
        route(None, "", [flag], {})
