"""Two real servers. One is killed in the middle of its streams, and the other one goes on with
them: together they say what one server alone says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.api.journal import Kept

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TINY = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB")
ENDS = ("[DONE]", "event: message_stop", "event: response.completed", "event: response.incomplete")
DOOR = {"headrace-journal": "1"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
ASK = [{"role": "user", "content": "Once upon a time"}]
LONG: dict[str, Any] = {"stream": True, "max_tokens": 300, "ignore_eos": True}
PROMPT = {"prompt": "Once upon a time", **LONG}
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string"}, "minItems": 40}},
    "required": ["words"],
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": ASK, **LONG, "logprobs": True, "stop": ["\n\n\n\n"]}),
    (MESSAGES, {"model": "tiny", "messages": ASK, **LONG}),
    (RESPONSES, {"input": "Once upon a time", "stream": True, "max_output_tokens": 300}),
    (COMPLETIONS, {**PROMPT, "temperature": 0}),
    (COMPLETIONS, {**PROMPT, "seed": 5}),
    (COMPLETIONS, PROMPT),  # its seed is drawn
    (COMPLETIONS, {**PROMPT, "seed": 6, "frequency_penalty": 0.5, "repetition_penalty": 1.2}),
    (COMPLETIONS, {**PROMPT, "seed": 7, "logprobs": 2, "stop": ["\n\n\n\n"]}),
    (COMPLETIONS, {**PROMPT, "seed": 8, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {**PROMPT, "seed": 9, "min_tokens": 200, "bad_words": ["e"]}),
    (
        COMPLETIONS,
        {
            **PROMPT,
            "seed": 10,
            "ignore_eos": False,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
]


async def forward(
    server: Server, path: str, body: Any, kept: Kept, most: float = float("inf")
) -> None:
    """Forward events until there are so many, or the stream ends: as it should, or not."""
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=100) as client,
        client.stream("POST", path, json=body, headers=DOOR) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["headrace-journal"] == "1"
        rest = ""
        try:
            async for text in response.aiter_text():
                *events, rest = (rest + text).split("\n\n")
                for event in events:
                    kept.forward(event)
                if kept.events >= most:
                    await asyncio.sleep(100)  # until the server is killed
        except (httpx.TransportError, TimeoutError):
            return


def told(events: list[str]) -> list[Any]:
    """What must be equal: all but ids, times, and how the server has cached the prompt."""
    data = [event.rpartition("data: ")[2] for event in events if not event.startswith(":")]
    chunks = [json.loads(text) for text in data if text != "[DONE]"]
    if "type" in chunks[0]:  # ids are in all events of Responses
        return [(chunk["type"], chunk.get("delta")) for chunk in chunks]
    for chunk in chunks:
        chunk.pop("id"), chunk.pop("created")
        for name in ("headrace", "prompt_tokens_details"):
            (chunk.get("usage") or {}).pop(name, None)
    return chunks


async def test_streams_outlive_their_server(
    start_server: StartServer, tiny_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    first, second = (
        start_server(tiny_model, *TINY, "--chat-template", template, wait=False) for _ in range(2)
    )
    first.wait_ready(), second.wait_ready()
    kept = [Kept() for _ in BODIES]
    reading = [
        asyncio.create_task(forward(first, path, body, it, 10 + 9 * index))
        for index, ((path, body), it) in enumerate(zip(BODIES, kept, strict=True))
    ]
    await asyncio.to_thread(
        first.wait_for,
        lambda: all(it.events >= 10 + 9 * index for index, it in enumerate(kept)),
        "streams under way",
    )
    first.process.kill()
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    at_death = [it.events for it in kept]
    await asyncio.gather(
        *(
            forward(second, path, {**body, "headrace_resume": it.member}, it)
            for (path, body), it in zip(BODIES, kept, strict=True)
        )
    )
    for (path, body), it, events in zip(BODIES, kept, at_death, strict=True):
        assert any(end in it.forwarded[-1] for end in ENDS) and events < it.events
        alone = Kept()
        await forward(second, path, {**body, "seed": it.head["seed"]}, alone)
        assert told(it.forwarded) == told(alone.forwarded), body
        if path in (CHAT, COMPLETIONS):
            assert len({json.loads(event[6:])["id"] for event in it.forwarded[:-1]}) == 1
