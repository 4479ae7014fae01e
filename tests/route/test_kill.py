"""Two real servers behind a real door, one killed in the middle of streams: nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal

import openai
import pytest
from tests.e2e.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STREAMS = 8
TOKENS = 48
MODEL = "SmolLM2-135M-Instruct"


async def text_of(
    client: openai.AsyncOpenAI, number: int, seen: list[int], temperature: float
) -> tuple[str, str, int]:
    """(text, finish reason, tokens) of one stream."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"Tell me {number + 3} things about a water mill."}],
        max_tokens=TOKENS,
        seed=number,
        temperature=temperature,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-session-id": f"session-{number}"},
    )
    text, finish, tokens, ids = "", "", 0, set()
    async for event in stream:
        ids.add((event.id, event.created))
        if event.usage is not None:
            tokens = event.usage.completion_tokens
        for choice in event.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            seen[number] += 1
    assert len(ids) == 1, "one id and one time for the whole stream"
    return text, finish, tokens


async def all_texts(
    door: Server, temperature: float, victim: Server | None = None
) -> list[tuple[str, str, int]]:
    seen = [0] * STREAMS
    async with door.async_client() as client:
        streams = asyncio.gather(
            *(text_of(client, number, seen, temperature) for number in range(STREAMS))
        )
        if victim is not None:
            while min(seen) < TOKENS // 4:
                await asyncio.sleep(0.01)
            engine = victim.engine_pid
            for pid in (victim.process.pid, engine):
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            assert min(seen) < TOKENS, "it was in the middle"
        return await streams


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_killed_replica_costs_no_token(
    door: Server, replicas: list[Server], temperature: float
) -> None:
    undisturbed = await all_texts(door, temperature)
    loads = [server.get("/load").json() for server in replicas]
    assert all(load["running"] == 0 for load in loads)
    disturbed = await all_texts(door, temperature, victim=replicas[0])
    assert disturbed == undisturbed
    metrics = door.get("/metrics").text
    resumed = [line for line in metrics.splitlines() if 'replays_total{outcome="resumed"}' in line]
    assert float(resumed[0].split()[1]) >= 1, "the one that was killed had streams"
    assert 'replays_total{outcome="lost"} 0' in metrics
