"""LLM: the engine as a Python object, without a server. Same engine, same client interface."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
import struct
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

from headrace.config import EngineConfig, load_options
from headrace.engine.build import build_engine
from headrace.engine.client import FinishReason, Task, TokenLogprobs
from headrace.engine.inprocess_client import InProcessEngineClient
from headrace.errors import EngineError, InvalidRequestError
from headrace.loading.checkpoint import open_checkpoint
from headrace.loading.resolver import resolve_model
from headrace.sampling_params import GenerateRequest, PoolingParams, SamplingParams
from headrace.text.output_text import OutputText
from headrace.text.processor import TextProcessor

T = TypeVar("T")
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class LLM:
    """A model loaded into this process.

        llm = LLM()                                   # the default model
        llm.chat([{"role": "user", "content": "Hi"}])[0].text

    Prompts given together run together. Options are those of `headrace serve`, with underscores.
    Calls may come from any thread, also from within a running event loop; close it, or use it as a
    context manager, to free its memory at a known time.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        """Load `model` (see `headrace serve --help` for what names one).

        Raises CheckpointError for model files that cannot be served, ConfigError for options.
        """
        self._open(load_options(model, options)[0])

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: EngineConfig) -> None:
        path = resolve_model(config.model, revision=config.model_options.revision)
        config = dataclasses.replace(config, model=str(path))
        checkpoint = open_checkpoint(path)
        self.text = TextProcessor.from_assets(
            checkpoint.tokenizer, template_file=config.model_options.chat_template
        )
        self._request_numbers = itertools.count()
        self._client = InProcessEngineClient(lambda: build_engine(config))
        self._client.tokenizer_json = self.text.tokenizer.to_json()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        try:
            self._call(self._client.start())
        except BaseException:
            self._stop_loop()
            raise

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
    ) -> list[Completion]:
        """Continue each prompt, text or token ids: `sampling.n` completions a prompt, in order."""
        sampling = sampling or SamplingParams()
        ids = [self._token_ids(prompt) for prompt in _as_batch(prompts)]
        return self._call(self._complete_all(ids, sampling))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answer a conversation, or several at once, by the model's own chat template."""
        batch: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self._chat_ids(conversation) for conversation in batch], sampling)

    def embed(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        *,
        dimensions: int | None = None,
    ) -> list[list[float]]:
        """A vector of each prompt, text or token ids, pooled as the model says. `dimensions`: only
        the first ones, of models that were trained for it; it is not checked whether this one was.
        """
        ids = [self._token_ids(prompt) for prompt in _as_batch(prompts)]
        return self._call(self._embed_all(ids, dimensions))

    def stream(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """The text of one continuation, piece by piece. Leaving the loop early aborts it."""
        ids = self._token_ids(prompt)
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(
            self._stream(ids, sampling or SamplingParams(), pieces), self._loop
        )
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            running.cancel()

    def stream_chat(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """As `stream`, for a conversation."""
        return self.stream(self._chat_ids(messages), sampling)

    def close(self) -> None:
        """Free the model. Idempotent."""
        if not self._loop.is_closed():
            self._call(self._client.close())
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- on the loop's thread -----------------------------------------------------------------

    async def _complete_all(
        self, prompts: list[list[int]], sampling: SamplingParams
    ) -> list[Completion]:
        return await asyncio.gather(
            *(
                self._complete(prompt, sampling.choice(index))
                for prompt in prompts
                for index in range(sampling.n)
            )
        )

    async def _embed_all(
        self, prompts: list[list[int]], dimensions: int | None
    ) -> list[list[float]]:
        info = await self._client.wait_ready()
        if info.pooling is None or Task.EMBED not in info.tasks:
            raise InvalidRequestError("This model makes no embeddings: it is a classifier.")
        params = PoolingParams(
            pooling=info.pooling.pooling, normalize=info.pooling.normalize, dimensions=dimensions
        )
        return await asyncio.gather(*(self._embed(prompt, params) for prompt in prompts))

    async def _embed(self, prompt: list[int], params: PoolingParams) -> list[float]:
        request = GenerateRequest(
            request_id=f"llm-{next(self._request_numbers)}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(),
            arrival_time=time.monotonic(),
            pooling=params,
        )
        stream = self._client.submit(request)
        try:
            async for output in stream:
                if output.vector is not None:
                    return list(struct.unpack(f"<{len(output.vector) // 4}f", output.vector))
                raise EngineError(output.error or "The engine made no vector.")
        finally:
            stream.abort()
        raise EngineError("The request was aborted.")

    async def _complete(self, prompt: list[int], sampling: SamplingParams) -> Completion:
        text: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        reason, cached = FinishReason.ABORT, 0
        async for piece in self._pieces(prompt, sampling):
            text.append(piece.text)
            token_ids.extend(piece.token_ids)
            logprobs.extend(piece.logprobs)
            prompt_logprobs = piece.prompt_logprobs or prompt_logprobs
            reason, cached = piece.reason or reason, piece.cached_tokens or cached
        return Completion(
            text="".join(text),
            token_ids=token_ids,
            finish_reason=str(reason),
            prompt_token_ids=prompt,
            cached_tokens=cached,
            logprobs=logprobs or None,
            prompt_logprobs=prompt_logprobs,
        )

    async def _stream(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        pieces: queue.SimpleQueue[str | BaseException | None],
    ) -> None:
        try:
            async for piece in self._pieces(prompt, sampling):
                if piece.text:
                    pieces.put(piece.text)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)
            raise

    async def _pieces(self, prompt: list[int], sampling: SamplingParams) -> AsyncIterator[_Piece]:
        """Outputs of one request with their text; aborts it when a stop string is found, or when
        nobody reads on."""
        request = GenerateRequest(
            request_id=f"llm-{next(self._request_numbers)}",
            prompt_token_ids=prompt,
            sampling=sampling,
            banned_sequences=self.text.tokenizer.spellings(sampling.bad_words),
            arrival_time=time.monotonic(),
        )
        output_text = OutputText(
            self.text.tokenizer,
            stop=sampling.stop,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
        )
        stream = self._client.submit(request)
        try:
            async for output in stream:
                if output.error is not None:
                    raise EngineError(output.error)
                piece = _Piece(prompt_logprobs=output.prompt_logprobs)
                texts = output_text.push_output(
                    output.token_ids,
                    ends=output.finish_reason is not None,
                    ends_with_stop_token=output.stop_token_id is not None,
                )
                piece.text = "".join(texts)
                piece.token_ids = output.token_ids[: len(texts)]
                piece.logprobs = (output.logprobs or [])[: len(texts)]
                if output_text.stopped is not None:
                    piece.reason = FinishReason.STOP
                else:
                    piece.reason = output.finish_reason
                piece.cached_tokens = output.cached_tokens or 0
                yield piece
                if piece.reason is not None:
                    return
        finally:
            stream.abort()

    # --- on the caller's thread ---------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.text.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        prompt = self.text.render_chat(messages)
        # The template has written the special tokens already.
        return self.text.tokenizer.encode(prompt, add_special_tokens=False)


@dataclasses.dataclass(slots=True)
class _Piece:
    """What one output adds to a completion."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    reason: FinishReason | None = None
    cached_tokens: int = 0


def _as_batch(prompts: Any) -> list[Any]:
    """One prompt (a string, or token ids) or several: always a list of prompts."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if one else list(prompts)
