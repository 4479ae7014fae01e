"""The client over a real engine process: what is not HTTP's business and not the scheduler's."""

from __future__ import annotations

import asyncio

import pytest

from headrace.config import CacheOptions, DeviceOptions, EngineConfig, ModelOptions
from headrace.engine.client import EngineState, QueueLimits
from headrace.engine.process_client import ProcessEngineClient
from headrace.errors import ConfigError, EngineError, UnavailableError
from headrace.sampling_params import GenerateRequest, SamplingParams

LIMITS = QueueLimits(max_queued_requests=100, max_queued_tokens=10_000)


def request(request_id: str, max_tokens: int) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=sampling)


async def test_load_run_reset_and_close(smollm2_path):
    config = EngineConfig(
        model=str(smollm2_path),
        model_options=ModelOptions(max_model_len=256),
        cache=CacheOptions(kv_cache_memory_bytes=1 << 24),
        device=DeviceOptions(threads=1),
    )
    client = ProcessEngineClient(config, limits=LIMITS)
    await client.start()
    with pytest.raises(UnavailableError, match="still loading"):
        client.submit(request("early", 1))
    info = await client.wait_ready()
    assert info.max_model_len == 256
    stream = client.submit(request("a", 40))
    assert (await anext(stream)).token_ids
    assert not await client.reset_prefix_cache(), "a request is running"
    tokens = [token async for output in stream for token in output.token_ids]
    assert len(tokens) == 39
    assert await client.reset_prefix_cache()
    lost = client.submit(request("b", 200))
    await client.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        async for _ in lost:
            pass
    with pytest.raises(UnavailableError):
        client.submit(request("late", 1))


async def test_a_model_that_cannot_be_loaded_is_not_tried_again(tmp_path):
    dead = asyncio.Event()
    client = ProcessEngineClient(
        EngineConfig(model=str(tmp_path / "missing.gguf")),
        limits=LIMITS,
        on_dead=lambda error: dead.set(),
    )
    await client.start()
    with pytest.raises(ConfigError, match="no such file"):
        await client.wait_ready()
    await dead.wait()
    assert (client.state, client.restarts) == (EngineState.DEAD, 0)
    await client.close()


async def test_engines_that_die_before_they_read_their_configuration(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", "/bin/false")
    client = ProcessEngineClient(EngineConfig(model=str(tmp_path)), limits=LIMITS)
    await client.start()
    with pytest.raises(EngineError, match="died 4 times"):
        await asyncio.wait_for(client.wait_ready(), 30)
    assert client.state is EngineState.DEAD
    await client.close()
