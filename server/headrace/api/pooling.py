"""From texts to vectors: one PoolingRun per HTTP request, however many inputs that has.

Owns the engine's requests that it submits: whatever happens to the HTTP side, they end with it.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import msgspec
from fastapi import Request, Response

from headrace.api.generation import new_id
from headrace.api.model_table import ServedModel
from headrace.api.pooling_protocol import PoolingBody
from headrace.api.prompts import MAX_INLINE_CHARACTERS
from headrace.api.services import Services, services_of
from headrace.api.streaming import unless_disconnected
from headrace.engine.client import FinishReason, ModelInfo, PoolingInfo, RequestStream, Task
from headrace.errors import (
    ContextLengthExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from headrace.sampling_params import GenerateRequest, PoolingParams, SamplingParams
from headrace.text.tokenizer import Tokenizer

T = TypeVar("T")

# Of one text, beyond what its tokens can stand for: normalizers drop characters, and words that no
# vocabulary has become one token.
SPARE_CHARACTERS = 2**13
# Of an answer that is encoded on the event loop: about 2 ms.
MAX_INLINE_VALUES = 2**14


class Encoded(NamedTuple):
    """One input of the model."""

    token_ids: list[int]
    second_text: int | None = None
    """Where the second text of a pair begins, where the tokenizer tells them apart."""


@dataclass(slots=True)
class PoolingRun:
    """The inputs of one HTTP request on their way through the engine."""

    model: ServedModel
    info: ModelInfo
    pooling: PoolingInfo
    tokenizer: Tokenizer
    services: Services
    response_id: str
    limit: int
    """Tokens of an input."""
    truncates: bool
    """Longer inputs are cut to that, and not refused."""
    keeps_end: bool
    priority: int = 0
    trace_context: str = ""
    prompt_tokens: int = 0
    """Of all inputs."""
    _submitted: int = 0
    _in_flight: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, request: Request, body: PoolingBody, task: Task, prefix: str) -> PoolingRun:
        """Raises ModelNotFoundError, and InvalidRequestError for a model that has not the task."""
        services = services_of(request)
        model = services.models.find(body.model)
        text, info = model.loaded_for(task)
        assert info.pooling is not None, "a model with such a task says how it pools"
        keep = body.truncate_prompt_tokens or 0
        if body.truncation_side is not None and not keep:
            raise InvalidRequestError(
                "truncation_side needs truncate_prompt_tokens.", param="truncation_side"
            )
        trace_context = request.headers.get("traceparent", "")
        return cls(
            model=model,
            info=info,
            pooling=info.pooling,
            tokenizer=text.tokenizer,
            services=services,
            response_id=new_id(prefix),
            limit=info.max_prompt_len if keep < 1 else min(keep, info.max_prompt_len),
            truncates=keep != 0,
            keeps_end=body.truncation_side == "left",
            priority=body.priority or 0,
            trace_context=trace_context if len(trace_context) <= 128 else "",
        )

    # --- tokens ---------------------------------------------------------------------------------

    async def encode(
        self,
        texts: Sequence[str],
        param: str,
        *,
        add_special_tokens: bool = True,
        most: int | None = None,
    ) -> list[Encoded]:
        """`most`: tokens to which a text is cut anyway. Raises a RequestError, naming `param`, for
        a text that is empty or too long."""
        texts = [self._within_reach(text, at) for text, at in _named(texts, param)]

        def encode() -> list[Encoded]:
            kept = self.limit if self.truncates else most
            if most is not None and kept is not None:
                kept = min(kept, most)
            found = self.tokenizer.encode_within(
                texts, kept, keeps_end=self.keeps_end, add_special_tokens=add_special_tokens
            )
            return [Encoded(token_ids) for token_ids in found]

        return self.checked(await off_loop_if_long(encode, sum(map(len, texts))), param)

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], param: str, *, max_second: int | None = None
    ) -> list[Encoded]:
        """Two texts as one input each; `max_second`: tokens of the second one."""

        def encode() -> list[Encoded]:
            kept = self.limit if self.truncates else None
            found = self.tokenizer.encode_pairs(
                cut, kept, max_second=max_second, keeps_end=self.keeps_end
            )
            return [Encoded(*one) for one in found]

        cut = [
            (self._within_reach(first, param), self._within_reach(second, param))
            for first, second in pairs
        ]
        size = sum(len(first) + len(second) for first, second in cut)
        return self.checked(await off_loop_if_long(encode, size), param)

    def _within_reach(self, text: str, param: str) -> str:
        """As much of the text as could be of use: only that is tokenized."""
        if not text:
            raise InvalidRequestError(f"{param} is an empty string; give it a text.", param=param)
        most = self.limit * self.tokenizer.longest_token + SPARE_CHARACTERS
        if len(text) <= most:
            return text
        if self.truncates:
            return text[-most:] if self.keeps_end else text[:most]
        raise ContextLengthExceededError(
            f"{param} has {len(text)} characters, more than the {self.limit} tokens that this "
            "model takes can stand for. Shorten it, or set truncate_prompt_tokens.",
            param=param,
        )

    def checked(self, inputs: list[Encoded], param: str) -> list[Encoded]:
        """Raises a RequestError for an input without tokens, or with too many."""
        for encoded, at in _named(inputs, param):
            count = len(encoded.token_ids)
            if count == 0:
                raise InvalidRequestError(f"{at} has no tokens; give it some text.", param=at)
            if count > self.limit:
                raise ContextLengthExceededError(
                    f"{at} has {count} tokens, and this model takes {self.limit}. Shorten it, or "
                    "set truncate_prompt_tokens.",
                    param=at,
                )
        return inputs

    # --- vectors --------------------------------------------------------------------------------

    async def run(
        self, request: Request, inputs: Sequence[Encoded], params: PoolingParams
    ) -> list[bytes]:
        """The vector of each input, float32 in little-endian order. Ends all if the client goes.

        Raises OverloadedError if the queue is full, EngineError if a request fails.
        """
        try:
            return await unless_disconnected(request.receive, self._run(inputs, params))
        except OverloadedError:
            with self.services.counting_rejections():
                raise

    async def _run(self, inputs: Sequence[Encoded], params: PoolingParams) -> list[bytes]:
        vectors = [b""] * len(inputs)
        numbered = iter(enumerate(inputs))

        async def work() -> None:
            for index, encoded in numbered:
                vectors[index] = await self._one(encoded, params)

        # Two batches of the engine: more would only fill its queue, which others share.
        workers = min(len(inputs), 2 * self.info.max_num_seqs)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        self.prompt_tokens += sum(len(encoded.token_ids) for encoded in inputs)
        return vectors

    async def _one(self, encoded: Encoded, params: PoolingParams) -> bytes:
        number, self._submitted = self._submitted, self._submitted + 1
        request = GenerateRequest(
            request_id=f"{self.response_id}-{number}",
            prompt_token_ids=encoded.token_ids,
            sampling=SamplingParams(),
            arrival_time=time.monotonic(),
            priority=self.priority,
            model_revision=self.model.revision,
            trace_context=self.trace_context,
            pooling=_with_second_text(params, encoded.second_text),
        )
        stream = await self._submit(request)
        self._in_flight += 1
        self.services.ledger.open(request.request_id, request.arrival_time)
        try:
            return await _vector(stream)
        finally:
            stream.abort()
            self.services.ledger.leave(request.request_id)
            self._in_flight -= 1
            self._ended.set()

    async def _submit(self, request: GenerateRequest) -> RequestStream:
        """Where the queue is full the request waits for others of this run to leave it."""
        while True:
            try:
                return self.model.client.submit(request)
            except OverloadedError:
                if not self._in_flight:
                    raise
            self._ended.clear()
            await self._ended.wait()

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}


def _with_second_text(params: PoolingParams, second_text: int | None) -> PoolingParams:
    if second_text is None:
        return params
    # By hand: dataclasses.replace takes several times as long.
    return PoolingParams(
        task=params.task,
        pooling=params.pooling,
        normalize=params.normalize,
        dimensions=params.dimensions,
        second_text=second_text,
    )


async def _vector(stream: RequestStream) -> bytes:
    async for output in stream:
        if output.vector is not None:
            return output.vector
        if output.finish_reason is FinishReason.DEADLINE:
            raise OverloadedError("The request waited past its deadline; try again later.")
        if output.finish_reason not in (None, FinishReason.ABORT):
            raise EngineError(output.error or "The engine failed while it worked on this request.")
    raise UnavailableError("The request was aborted by the server; try again.")


def _named(items: Sequence[T], param: str) -> Iterator[tuple[T, str]]:
    """Each with the name of its place: `input`, or input[3] if there are several."""
    for index, item in enumerate(items):
        yield item, param if len(items) == 1 else f"{param}[{index}]"


async def off_loop_if_long(work: Callable[[], T], characters: int) -> T:
    return await asyncio.to_thread(work) if characters > MAX_INLINE_CHARACTERS else work()


def values(vector: bytes) -> tuple[float, ...]:
    """[E] floats of what the engine sends."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def extras(ignored: list[str]) -> dict[str, Any]:
    """Fields beside the answer: what was not understood."""
    return {"headrace": {"ignored_fields": ignored}} if ignored else {}


async def respond(shape: Callable[[], Any], size: int) -> Response:
    """The JSON of what `shape` makes, off the event loop where that is of many values."""

    def encode() -> bytes:
        return msgspec.json.encode(shape())

    body = await asyncio.to_thread(encode) if size > MAX_INLINE_VALUES else encode()
    return Response(body, media_type="application/json")
