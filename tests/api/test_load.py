"""GET /load: the numbers that spread requests over replicas."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from headrace.engine.client import EngineState, EngineStats
from headrace.engine.speed import Speed
from headrace.sampling_params import GenerateRequest, SamplingParams

CHAT = "/v1/chat/completions"


async def load(http: httpx.AsyncClient, **query: str) -> dict[str, Any]:
    response = await http.get("/load", params=query)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


async def test_an_idle_replica(http: httpx.AsyncClient, site: Any) -> None:
    site.model.digest, site.model.revision = "sha256:ab", "main"
    assert await load(http) == {
        "version": 1,
        "model": "org/tiny",
        "revision": "main",
        "digest": "sha256:ab",
        "ready": True,
        "draining": False,
        "running": 0,
        "queued": 0,
        "queued_tokens": 0,
        "kv_used_blocks": 0,
        "kv_total_blocks": 64,
        "block_size": 16,
        "step_age_s": 0.0,
        "prefill_tokens_per_s": 0.0,
        "decode_step_s": 0.0,
        "prefix_query_tokens": 0,
        "prefix_hit_tokens": 0,
        "max_num_seqs": 8,
    }


async def test_a_request_counts_from_its_arrival(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.hold = True
    sampling = SamplingParams(max_tokens=4)
    for name in ("a", "b"):
        site.engine.submit(
            GenerateRequest(request_id=name, prompt_token_ids=[1] * 5, sampling=sampling)
        )
    answer = await load(http)
    assert (answer["running"], answer["queued"], answer["queued_tokens"]) == (0, 2, 10)
    site.engine.stats = EngineStats(running=1, waiting=1, kv_blocks_used=3, kv_blocks_total=64)
    answer = await load(http)
    assert (answer["running"], answer["queued"], answer["kv_used_blocks"]) == (1, 1, 3)


async def test_draining_and_loading_are_told(http: httpx.AsyncClient, site: Any) -> None:
    services = site.app.state.services
    services.draining = True
    answer = await load(http)
    assert (answer["ready"], answer["draining"]) == (False, True)
    services.draining = False
    site.engine.state, site.engine.loaded, site.model.text = EngineState.LOADING, False, None
    answer = await load(http)
    assert (answer["ready"], answer["draining"], answer["kv_total_blocks"]) == (False, False, 0)


async def test_an_unknown_model(http: httpx.AsyncClient) -> None:
    assert (await load(http, model="org/tiny"))["model"] == "org/tiny"
    response = await http.get("/load", params={"model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_prefixes_are_told_on_to_who_asks(http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    before = await load(http, since="0")
    assert before["prefixes"] == []
    for value in ("1 ab:12 cd:20", "garbage"):
        await http.post(CHAT, json=body, headers={"headrace-prefix": value})
    after = await load(http, since=str(before["since"]))
    assert (after["prefixes"], after["since"]) == (["1 ab:12 cd:20"], before["since"] + 1)
    assert "prefixes" not in await load(http)
    response = await http.get("/load", params={"since": "-1"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "since"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_what_its_prompt_was(http: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "stream": stream}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["headrace-prompt"] == "tokens=2;cached=2"  # as the fake engine has it


def test_speeds_are_told_apart_by_what_a_step_computes() -> None:
    speed = Speed()
    idle = EngineStats()
    prompt = EngineStats(running=2, steps=1, step_tokens=500, last_step_time=1.0)
    speed.observe(idle, EngineStats(steps=1, step_tokens=500, last_step_time=100.0))
    assert speed.prefill_tokens_per_s == 0.0, "the engine was idle before"
    speed.observe(idle, prompt)
    decode = EngineStats(running=2, steps=3, step_tokens=2, last_step_time=1.04)
    speed.observe(prompt, decode)
    assert speed.prefill_tokens_per_s == 500.0
    assert speed.decode_step_s == pytest.approx(0.02)
    speed.observe(decode, EngineStats(running=2, steps=4, step_tokens=2, last_step_time=1.08))
    assert speed.decode_step_s == pytest.approx(0.022)
    speed.observe(decode, decode)
    assert (speed.prefill_tokens_per_s, speed.decode_step_s) == (500.0, pytest.approx(0.022))
