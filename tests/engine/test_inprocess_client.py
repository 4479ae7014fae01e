"""Many readers on one engine in this process, some of whom leave."""

from __future__ import annotations

import asyncio
import random

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.build import build_engine
from headrace.engine.client import FinishReason
from headrace.engine.inprocess_client import InProcessEngineClient
from headrace.sampling_params import GenerateRequest, SamplingParams


async def test_64_streams_of_which_a_third_leave(checkpoint):
    engine = build_engine(
        EngineConfig(
            model=str(checkpoint),
            model_options=ModelOptions(dtype="float32", max_model_len=256),
            # Too few blocks for all, so that leaving meets preemption and waiting.
            cache=CacheOptions(kv_cache_memory_bytes=1 << 19, block_size=4),
            scheduler=SchedulerOptions(max_num_seqs=32, max_num_batched_tokens=64),
            device=DeviceOptions(device="cpu", threads=1),
        )
    )
    records = []
    client = InProcessEngineClient(lambda: engine, on_record=records.append)
    await client.start()
    draw = random.Random(5)

    async def read(index: int) -> int | None:
        """Tokens of the whole stream, or None after leaving in its middle."""
        length, leaves_after = draw.randint(5, 60), draw.randint(0, 4)
        prompt = [draw.randint(1, 159) for _ in range(draw.randint(1, 90))]
        sampling = SamplingParams(max_tokens=length, ignore_eos=True, seed=index)
        stream = client.submit(
            GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
        )
        received = 0
        async for output in stream:
            received += len(output.token_ids)
            if index % 3 == 0 and received > leaves_after:
                stream.abort()
                return None
        assert received == length
        return received

    results = await asyncio.gather(*(read(index) for index in range(64)))
    while engine.has_work:
        await asyncio.sleep(0)
    engine.check_invariants()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert results.count(None) == 22
    reasons = [record.finish_reason for record in records]
    assert len(reasons) == 64, "every request ends in one record"
    assert reasons.count(FinishReason.LENGTH) >= 42
    await client.close()
