"""Whether a version can be loaded beside what runs, by the arithmetic of `headrace plan`.

That opens its files, so it is done in a process of its own: one that is cut short while it is
mapped ends the process that reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import replace

import msgspec

from headrace.config import GIB, EngineConfig, engine_environment
from headrace.errors import CheckpointError, HeadraceError


class Question(msgspec.Struct, frozen=True):
    alone: EngineConfig
    """As it would be loaded if it had the machine to itself."""
    beside: EngineConfig
    """As it would be loaded beside the others."""
    freed: int
    """Bytes of those which it replaces: all that they may hold."""
    claimed: int = 0
    """Bytes that those which are loaded may still take: memory of a CPU counts as free until it is
    written to."""


class Verdict(msgspec.Struct, frozen=True):
    error: str = ""
    """Why it cannot be loaded at all."""
    no_room: str = ""
    """Why it cannot be loaded beside the others."""


async def fits(question: Question) -> Verdict:
    """Reads headers only. The process ends with the task that waits for it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "headrace.hosting.fit",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=engine_environment(),
    )
    try:
        answer, _ = await process.communicate(msgspec.json.encode(question))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode != 0:
        return Verdict(f"Reading its files ended with status {process.returncode}.")
    return msgspec.json.decode(answer, type=Verdict)


def judge(question: Question) -> Verdict:
    """What the process answers."""
    from headrace.engine.hardware import probe
    from headrace.engine.plan import make_plan

    device = question.alone.device
    try:
        hardware = probe(device.device, deterministic=device.deterministic)
        unclaimed = max(0, hardware.memory_bytes - question.claimed)
        hardware = replace(hardware, memory_bytes=unclaimed)
        roomy = replace(hardware, memory_bytes=hardware.memory_bytes + question.freed)
        make_plan(question.alone, roomy)
    except HeadraceError as error:
        return Verdict(error.message)
    try:
        plan = make_plan(question.beside, hardware)
    except CheckpointError as error:
        return Verdict(error.message)
    except HeadraceError as error:
        return Verdict(no_room=error.message)
    resolved = plan.resolved
    needed, free = resolved.weight_bytes + resolved.kv_cache_bytes, hardware.memory_bytes
    if needed > free:  # on a GPU the plan has refused it
        return Verdict(
            no_room=f"Weights and KV cache take {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB "
            f"are free on {resolved.device}."
        )
    return Verdict()


def beside(config: EngineConfig, kv_cache_bytes: int) -> EngineConfig:
    """For a version that takes the place of one with so large a KV cache: it gets as much, not a
    share of what that one left."""
    if config.cache.kv_cache_memory_bytes is not None or not kv_cache_bytes:
        return config
    return replace(config, cache=replace(config.cache, kv_cache_memory_bytes=kv_cache_bytes))


def main() -> None:
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(judge(question)))


if __name__ == "__main__":
    main()
