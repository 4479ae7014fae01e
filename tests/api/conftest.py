"""A deterministic engine inside this process, a small tokenizer, and ways to reach the app."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from openai.types import Batch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from headrace.api.api_config import ApiConfig
from headrace.api.app import create_app
from headrace.api.batch_runner import BatchRunner
from headrace.api.model_table import ModelTable, ServedModel
from headrace.api.store_sqlite import SqliteStore
from headrace.engine.client import (
    EngineState,
    EngineStats,
    FinishReason,
    ModelInfo,
    QueueLimits,
    RequestOutput,
    RequestRecord,
    StepOutputs,
    TokenLogprobs,
    Workload,
)
from headrace.engine.live_requests import LiveRequests, LiveStream
from headrace.errors import HeadraceError, UnavailableError
from headrace.observability.metrics import Metrics
from headrace.sampling_params import GenerateRequest
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

MODEL = "org/tiny"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(more: tuple[str, ...] = ()) -> Tokenizer:
    """One token per byte (ids 0 to 255 in the alphabet's order) and three special tokens, or
    `more`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = (*specials, *more)
    fast.add_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    return Tokenizer(fast, {"bos_token": specials[1], "eos_token": specials[2]})


@dataclass
class FakeEngine:
    """An EngineClient that answers every request with `answer`, a token a step, one step after the
    other for all requests. The bookkeeping of requests is the real one."""

    tokenizer: Tokenizer
    answer: str = "Hello, world!"
    step_seconds: float = 0.0
    fail_after: int | None = None
    """Tokens after which a request ends with an error."""
    fail_reason: FinishReason = FinishReason.ERROR
    lose_after: int | None = None
    """Tokens after which the whole engine is lost."""
    burst: int = 1
    """Tokens per step, as when the reader is slow."""
    last_first: bool = False
    """Only the request that came last gets tokens, until it ends."""
    hold: bool = False
    """Take requests, do nothing."""
    refuse: HeadraceError | None = None
    refuse_grammars: str | None = None
    """Why requests with one end before their first token."""
    max_model_len: int = 512
    state: EngineState = EngineState.READY
    restarts: int = 0
    last_seen_age: float = 0.0
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)
    on_record: Callable[[RequestRecord], None] = lambda record: None
    loaded: bool = True

    def __post_init__(self) -> None:
        self.stats = EngineStats()
        self.live = LiveRequests(
            QueueLimits(64, 100_000), on_abort=self._abort, on_end=self._on_end
        )
        self._running: dict[str, tuple[int, LiveStream, list[int]]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo | None:
        if not self.loaded:
            return None
        return ModelInfo(
            max_model_len=self.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            eos_token_ids=[self.eos],
            num_blocks=64,
            block_size=16,
            max_num_seqs=8,
            dtype="float32",
            device="cpu",
            weight_bytes=1,
            kv_cache_bytes=1,
            load_seconds=0.0,
            kernels={},
        )

    @property
    def eos(self) -> int:
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    @property
    def workload(self) -> Workload:
        return self.live.queue.workload

    async def start(self) -> None: ...

    async def wait_ready(self) -> ModelInfo:
        assert self.info is not None
        return self.info

    async def reset_prefix_cache(self) -> bool:
        return not self._running

    async def close(self) -> None:
        self.live.fail_all(UnavailableError("The server is shutting down."))

    def submit(self, request: GenerateRequest) -> LiveStream:
        if self.refuse is not None:
            raise self.refuse
        assert self.info is not None
        handle, stream = self.live.admit(request, self.info)
        self.requests.append(request)
        script = self.tokenizer.encode(self.answer, add_special_tokens=False)
        self._running[request.request_id] = (handle, stream, [*script, self.eos])
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._steps())
        return stream

    async def _steps(self) -> None:
        while self._running:
            await asyncio.sleep(self.step_seconds)
            if self.hold:
                await asyncio.sleep(0.01)
                continue
            for request_id in list(self._running)[-1 if self.last_first else 0 :]:
                for _ in range(self.burst):
                    if request_id in self._running:
                        self._step(request_id)

    def _step(self, request_id: str) -> None:
        handle, stream, script = self._running[request_id]
        sampling = stream.request.sampling
        made = len(stream.received)
        first = self._is_first(stream)
        if self.lose_after is not None and made >= self.lose_after:
            self._running.clear()
            self.live.fail_all(UnavailableError("The engine is gone."))
            return
        if self.refuse_grammars is not None and stream.request.grammar:
            self._end(stream, [], FinishReason.REFUSED, error=self.refuse_grammars)
            return
        if self.fail_after is not None and made >= self.fail_after:
            self._end(stream, [], self.fail_reason, error="The engine failed on this request.")
            return
        token = script[made] if made < len(script) else script[made % (len(script) - 1)]
        if sampling.ignore_eos and token == self.eos:
            token = script[0]
        stops = () if sampling.ignore_eos else (self.eos, *sampling.stop_token_ids)
        if token in stops and made >= sampling.min_tokens:
            self._end(stream, [token], FinishReason.STOP, stop_token_id=token)
        elif made + 1 == (sampling.max_tokens or self._room(stream)):
            self._end(stream, [token], FinishReason.LENGTH)
        elif first or sampling.logprobs is not None:
            self._deliver(self._output(stream, [token]))
        else:
            self.live.deliver(StepOutputs([handle], [token], []))

    def _is_first(self, stream: LiveStream) -> bool:
        """Whether it has no token yet but those it came with."""
        return len(stream.received) == len(stream.request.resume_token_ids)

    def _room(self, stream: LiveStream) -> int:
        return self.max_model_len - len(stream.request.prompt_token_ids)

    def _end(
        self,
        stream: LiveStream,
        tokens: list[int],
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> None:
        del self._running[stream.request_id]
        record = self._record(stream, reason, len(stream.received) + len(tokens))
        output = self._output(
            stream,
            tokens,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
            record=record,
        )
        self._deliver(output)

    def _output(self, stream: LiveStream, tokens: list[int], **more: Any) -> RequestOutput:
        sampling = stream.request.sampling
        prompt = stream.request.prompt_token_ids
        if sampling.logprobs is not None and tokens:
            more["logprobs"] = [self._logprobs(token, sampling.logprobs) for token in tokens]
        if sampling.prompt_logprobs is not None and not stream.received:
            top = sampling.prompt_logprobs
            more["prompt_logprobs"] = [None, *(self._logprobs(token, top) for token in prompt[1:])]
        if self._is_first(stream):
            more["cached_tokens"] = min(4, len(prompt))
            more["scheduled_time"] = stream.request.arrival_time + 0.001
            more["first_token_time"] = stream.request.arrival_time + 0.003
        return RequestOutput(request_id=stream.request_id, token_ids=tokens, **more)

    def _logprobs(self, token: int, top: int) -> TokenLogprobs:
        """A token has -id/100; the most likely ones are those from 65 on, with -id/1000."""
        others = list(range(65, 65 + top))
        return TokenLogprobs(-token / 100, others, [-other / 1000 for other in others])

    def _deliver(self, output: RequestOutput) -> None:
        self.live.deliver(StepOutputs([], [], [output]))

    def _abort(self, request_id: str) -> None:
        """As the engine does: the blocks are freed, and the record follows a step later."""
        _, stream, _ = self._running.pop(request_id)
        self.aborted.append(request_id)
        record = self._record(stream, FinishReason.ABORT, len(stream.received))
        output = RequestOutput(
            request_id=request_id, finish_reason=FinishReason.ABORT, record=record
        )
        asyncio.get_running_loop().call_soon(self._deliver, output)

    def _record(self, stream: LiveStream, reason: FinishReason, made: int) -> RequestRecord:
        request, now = stream.request, time.monotonic()
        return RequestRecord(
            request_id=request.request_id,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=made,
            cached_tokens=min(4, len(request.prompt_token_ids)),
            preemptions=3,
            arrival_time=request.arrival_time,
            scheduled_time=request.arrival_time,
            first_token_time=now if made else 0.0,
            finished_time=now,
            max_tokens=request.sampling.max_tokens,
        )

    def _on_end(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.on_record(record)


@dataclass
class Site:
    """An application with its parts, for tests to turn knobs on."""

    app: FastAPI
    engine: FakeEngine
    model: ServedModel
    metrics: Metrics

    @property
    def services(self) -> Any:
        return self.app.state.services

    def metric(self, name: str, **labels: str) -> float:
        """A sample of our own metrics; 0 for a series that does not exist yet."""
        return self.metrics.registry.get_sample_value(f"headrace_{name}", labels) or 0.0

    def finished(self, reason: str) -> float:
        """How many requests the metrics say have ended so."""
        return self.metric("requests_finished_total", model_name=MODEL, finished_reason=reason)

    async def settle(self) -> None:
        """Wait until the engine has nothing to do and every account is closed."""
        async with asyncio.timeout(5):
            while len(self.services.ledger) or len(self.engine.live):
                await asyncio.sleep(0.005)


def make_site(
    template: str | None = TEMPLATE, specials: tuple[str, ...] = (), **options: Any
) -> Site:
    tokenizer = byte_tokenizer(specials)
    engine = FakeEngine(tokenizer)
    model = ServedModel(
        name=MODEL,
        client=engine,
        text=TextProcessor(tokenizer, template),
        digest="sha256:0123456789abcdef0123456789abcdef",
        aliases=("tiny",),
        created=1_700_000_000,
    )
    metrics = Metrics(MODEL)
    app = create_app(ModelTable(model), ApiConfig(version="1.2.3", **options), metrics)
    engine.on_record = app.state.services.ledger.close
    return Site(app, engine, model, metrics)


@pytest.fixture
def site_with() -> Callable[..., Site]:
    """Makes a site with given ApiConfig options (and `template`, `specials`)."""
    return make_site


@pytest.fixture
def site() -> Site:
    return make_site()


@pytest.fixture
async def http(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    """The app without a socket: for everything but streams that are cut."""
    async with http_client(site) as client:
        yield client


@pytest.fixture
def http_to() -> Callable[[Site], httpx.AsyncClient]:
    return http_client


def http_client(site: Site) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=site.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@dataclass
class RunningServer:
    site: Site
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def serve(site: Site) -> AsyncIterator[RunningServer]:
    """A real uvicorn on this event loop, at a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(site.app, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield RunningServer(site, listener.getsockname()[1])
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


@pytest.fixture
def serving() -> Callable[[Site], contextlib.AbstractAsyncContextManager[RunningServer]]:
    return serve


@pytest.fixture
async def server(site: Site) -> AsyncIterator[RunningServer]:
    async with serve(site) as running:
        yield running


# --- what is kept -------------------------------------------------------------------------------


@dataclass
class Keeping:
    """A site that keeps files and batches in a folder, and works on them."""

    site: Site
    store: SqliteStore
    runner: BatchRunner
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def upload(self, *lines: Any) -> str:
        """The id of a file with these lines: text and bytes as they are, the rest as JSON."""
        rows = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        data = b"\n".join(row.encode() if isinstance(row, str) else row for row in rows)
        uploaded = await self.openai.files.create(file=("in.jsonl", data), purpose="batch")
        return uploaded.id

    async def create(self, *lines: Any, endpoint: Any = "/v1/completions", **more: Any) -> Batch:
        """A batch of these lines."""
        return await self.openai.batches.create(
            input_file_id=await self.upload(*lines),
            endpoint=endpoint,
            completion_window="24h",
            **more,
        )

    async def run(self, *lines: Any, **more: Any) -> Batch:
        """A batch of these lines, at its end."""
        return await self.ended((await self.create(*lines, **more)).id)

    async def ended(self, batch_id: str, seconds: float = 20) -> Batch:
        async with asyncio.timeout(seconds):
            while True:
                batch = await self.openai.batches.retrieve(batch_id)
                if batch.status in ("completed", "failed", "expired", "cancelled"):
                    return batch
                await asyncio.sleep(0.02)

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        content = await self.openai.files.content(file_id)
        return [json.loads(row) for row in content.text.splitlines()]


@contextlib.asynccontextmanager
async def keep(folder: Path, *, work: bool = True, **options: Any) -> AsyncIterator[Keeping]:
    """`work=False`: the runner is there, but not started."""
    site = make_site(**options)
    store = SqliteStore(folder)
    await store.open()
    site.services.store = store
    runner = BatchRunner(site.app, site.services, poll_seconds=0.05)
    if work:
        runner.start()
    async with http_client(site) as client:
        openai_client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="any", http_client=client, max_retries=0
        )
        try:
            yield Keeping(site, store, runner, client, openai_client)
        finally:
            await runner.close()
            await store.close()


@pytest.fixture
def keeping() -> Callable[..., contextlib.AbstractAsyncContextManager[Keeping]]:
    return keep


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Keeping]:
    async with keep(tmp_path / "data") as one:
        yield one
