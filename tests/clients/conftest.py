"""Servers for clients that others wrote: a real one, and one whose answers a test writes itself.

Every client is only told a base URL. With `--base-url` the real one is whatever answers there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from tests.api.conftest import MODEL as SCRIPTED_MODEL
from tests.api.conftest import FakeEngine, RunningServer, make_site, serve
from tests.e2e.conftest import LIGHT, PATIENCE, _kept_whole

from headrace.api.batch_runner import BatchRunner
from headrace.api.store_sqlite import SqliteStore
from headrace.engine.live_requests import LiveStream
from headrace.errors import OverloadedError
from headrace.sampling_params import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable

# Before a client is imported: no reports to its makers, no look-ups on the network.
os.environ.update(
    ANONYMIZED_TELEMETRY="False",
    DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    LANGSMITH_TRACING="false",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    LITELLM_TELEMETRY="False",
)
# What the person running the tests has set for other servers.
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
    os.environ.pop(name, None)

# Run by test_openai2.py, in an environment of their own.
collect_ignore = ["openai2"]

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call></tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Target:
    """Where a client is sent."""

    url: str
    model: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=self.v1, api_key="any", **options)

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        options = {"max_retries": 0, "timeout": PATIENCE, **options}
        return openai.AsyncOpenAI(base_url=self.v1, api_key="any", **options)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)


@pytest.fixture(scope="session")
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """The default model on the real server, or what --base-url names. Tests leave it idle."""
    given: str | None = request.config.getoption("--base-url")
    if given is None:
        for server in _kept_whole(tmp_path_factory.mktemp("clients"), LIGHT):
            yield _target(server.url)
    else:
        yield _target(given.rstrip("/").removesuffix("/v1"))


def _target(url: str) -> Target:
    models = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()
    return Target(url, models["data"][0]["id"])


# --- answers by the book ------------------------------------------------------------------------


class ScriptedEngine(FakeEngine):
    """Answers as the last message says, so that clients in any language and process can script it:

    * `say TEXT`: with TEXT; `call NAME ARGUMENTS`: with a call of that tool, in JSON;
    * `busy KEY ...`: first refused, and when it comes again answered as the rest says;
    * the result of a tool: with `The tool said: RESULT`.

    Everything else it answers with `Hello, world!`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refused: set[str] = set()

    def submit(self, request: GenerateRequest) -> LiveStream:
        text = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
        role, said = turns[-1] if turns else ("user", text)
        if busy := re.match(r"busy (\S+) ", said):
            if busy[1] not in self._refused:
                self._refused.add(busy[1])
                raise OverloadedError("The queue is full.", retry_after=1.0)
            said = said[busy.end() :]
        self.answer = _answer(role, said)
        return super().submit(request)


def _answer(role: str, said: str) -> str:
    if role == "tool":
        return f"The tool said: {said}"
    if said.startswith("say "):
        return said[4:]
    if said.startswith("call "):
        calls = []
        for line in said.splitlines():
            name, _, arguments = line.removeprefix("call ").partition(" ")
            call = {"name": name, "arguments": json.loads(arguments or "{}")}
            calls.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
        return "\n".join(calls)
    return "Hello, world!"


@dataclass(frozen=True)
class Scripted(Target):
    engine: ScriptedEngine


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """The real API over a ScriptedEngine, in a thread of this process."""
    data = tmp_path_factory.mktemp("scripted")
    site = make_site(template=TEMPLATE)
    engine = ScriptedEngine(site.engine.tokenizer, max_model_len=2048)
    engine.on_record = site.engine.on_record
    site.engine = site.model.client = engine
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Awaitable[Any]) -> Any:
        async def one() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(one(), loop).result(PATIENCE)

    async def begin() -> tuple[RunningServer, Any, BatchRunner, SqliteStore]:
        store = SqliteStore(data)
        await store.open()
        site.services.store = store
        runner = BatchRunner(site.app, site.services, poll_seconds=0.05)
        runner.start()
        context = serve(site)
        return await context.__aenter__(), context, runner, store

    async def end() -> None:
        await context.__aexit__(None, None, None)
        await runner.close()
        await store.close()

    running, context, runner, store = run(begin())
    yield Scripted(running.url, SCRIPTED_MODEL, engine)
    run(end())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)


@pytest.fixture(scope="session")
def here() -> Path:
    return Path(__file__).parent
