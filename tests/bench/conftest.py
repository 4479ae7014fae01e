"""A small scripted OpenAI server in a thread: it answers as told and counts as a real one would."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Script:
    """How the server behaves. `break_at` cuts the connection before that token, `lie` is added to
    what /metrics counts."""

    token_delay: float = 0.0
    first_event_early: bool = False
    status: int = 200
    break_at: int | None = None
    finish_reason: str | None = "length"
    send_done: bool = True
    error_event: bool = False
    fewer_tokens: int = 0
    has_metrics: bool = True
    lie: dict[str, float] = field(default_factory=dict)
    metrics_prefix: str = "headrace_"


class FakeServer:
    """Serves the model `fake` on a port of its own. Bodies of generation requests are kept."""

    def __init__(self) -> None:
        self.script = Script()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._counts = dict.fromkeys(
            ("finished", "prompt", "generation", "ttft_count", "ttft"), 0.0
        )
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split()
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path.endswith("/completions"):
            self.headers.append(headers)
            await self._generate(path, json.loads(body), writer)
        else:
            status, content = self._answer(path, json.loads(body or b"null"))
            self._write(writer, status, content)
        writer.close()

    def _answer(self, path: str, body: Any) -> tuple[int, bytes]:
        match path:
            case "/v1/models":
                return 200, json.dumps({"data": [{"id": "fake"}]}).encode()
            case "/v1/models/fake":
                return 200, json.dumps({"id": "fake", "digest": "d1"}).encode()
            case "/tokenizer_info":
                return 200, json.dumps({"vocab_size": 5000}).encode()
            case "/version":
                return 200, json.dumps({"version": "9.9"}).encode()
            case "/detokenize":
                return 200, json.dumps({"prompt": " ".join(map(str, body["tokens"]))}).encode()
            case "/metrics" if self.script.has_metrics:
                return 200, self._metrics().encode()
        return 404, b"{}"

    def _metrics(self) -> str:
        counts, prefix = dict(self._counts), self.script.metrics_prefix
        for name, lie in self.script.lie.items():
            # From the second request on, so that the warm-up does not tell the lie already.
            counts[name] += lie if counts["finished"] > 1 else 0
        finished = "request_success" if prefix == "vllm:" else "requests_finished"
        return "\n".join(
            (
                f'{prefix}{finished}_total{{finished_reason="length"}} {counts["finished"]}',
                f'{prefix}{finished}_total{{finished_reason="abort"}} 77',
                f'{prefix}prompt_tokens_total{{model_name="fake"}} {counts["prompt"]}',
                f'{prefix}generation_tokens_total{{model_name="fake"}} {counts["generation"]}',
                f'{prefix}time_to_first_token_seconds_count{{m="f"}} {counts["ttft_count"]}',
                f'{prefix}time_to_first_token_seconds_sum{{m="f"}} {counts["ttft"]}',
            )
        )

    def _write(self, writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)

    async def _generate(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        script = self.script
        self.bodies.append(body)
        if script.status != 200:
            self._write(writer, script.status, b'{"error": {"message": "no room"}}')
            return
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._stream(path, body, writer, script)
        finally:
            self._at_once -= 1

    async def _stream(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter, script: Script
    ) -> None:
        began, chat = time.monotonic(), "chat" in path
        total = body.get("max_completion_tokens" if chat else "max_tokens", 0) - script.fewer_tokens

        def event(content: Any) -> None:
            data = b"data: " + (
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
            data = b": comment\n" + data + b"\n\n"
            # Chunks end inside of lines: the client has to put them together.
            for part in (data[:9], data[9:]):
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))

        def choice(text: str, reason: str | None = None) -> dict[str, Any]:
            content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [content | {"index": 0, "finish_reason": reason}]}

        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if script.first_event_early:
            event(choice(""))
        for number in range(total):
            await asyncio.sleep(script.token_delay)
            if number == script.break_at:
                return
            if number == 0:
                self._counts["ttft_count"] += 1
                self._counts["ttft"] += time.monotonic() - began
            event(choice("x", script.finish_reason if number == total - 1 else None))
        prompt = body.get("prompt") or body["messages"][0]["content"].split()
        self._counts["finished"] += 1
        self._counts["prompt"] += len(prompt)
        self._counts["generation"] += total
        if script.error_event:
            event({"error": {"message": "engine lost", "code": "internal_error"}})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": total}
        event({"choices": [], "usage": usage})
        if script.send_done:
            event(b"[DONE]")
        writer.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()
