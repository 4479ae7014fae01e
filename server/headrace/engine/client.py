"""What the API process sees of an engine: submit token ids, iterate over outputs, ask how it is.

`EngineClient` is the interface; `process_client.py` runs the engine in a process of its own and
`LLM` uses the same engine in this process. The values are plain dataclasses: nothing here imports
torch, or what encodes them (wire.py).
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from headrace.sampling_params import GenerateRequest


class FinishReason(enum.StrEnum):
    STOP = "stop"
    """An end-of-sequence token, a stop token or (decided by the text side) a stop string."""
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"
    REFUSED = "refused"
    """The request's grammar cannot be used; the output's error says why."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, before penalties, temperature and filters."""

    logprob: float
    """Of the token that stands at this position."""
    top_token_ids: list[int]
    """The most likely tokens, best first; empty when only the token's own was asked for."""
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """The one typed end of every request; metrics, logs, traces and usage all read it.

    Times are time.monotonic() seconds; those of stages that were never reached are 0.
    """

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    preemptions: int
    arrival_time: float
    scheduled_time: float
    first_token_time: float
    finished_time: float
    tenant: str = ""
    max_tokens: int | None = None


@dataclass(slots=True, kw_only=True)  # one is made per token, and a frozen one takes thrice as long
class RequestOutput:
    """What became known of one request since the last output: one step's token, or several when
    the reader is slower than the engine."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token (None for the first), once, with the first output."""
    cached_tokens: int | None = None
    """Prompt tokens whose KV came from the prefix cache; with the first output."""
    scheduled_time: float = 0.0
    """time.monotonic() at which the first step with this request began; with the first output."""
    first_token_time: float = 0.0
    """time.monotonic() at which the first token was known; with the first output."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended the request; it is the last of `token_ids`."""
    error: str | None = None
    vector: bytes | None = None
    """Of a pooling request, at its end: float32, little-endian."""
    record: RequestRecord | None = None
    """Present exactly when finish_reason is."""


class Task(enum.StrEnum):
    """What a model can be asked for."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"
    """Scores of labels."""
    SCORE = "score"
    """How well two texts fit: by a classifier of one label, or by two embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingInfo:
    """What a model makes of a prompt besides tokens."""

    pooling: Literal["mean", "cls", "last"]
    normalize: bool
    dimensions: int
    """Of an embedding."""
    matryoshka: bool = False
    """Trained so that fewer dimensions are an embedding, too."""
    labels: list[str] = field(default_factory=list)
    """Of a classifier."""
    score_activation: Literal["sigmoid", "softmax", "none"] = "none"
    """What turns its logits into scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a loaded engine tells about itself."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    dtype: str
    device: str
    weight_bytes: int
    kv_cache_bytes: int
    load_seconds: float
    kernels: dict[str, str]
    """stem -> the candidate that was chosen for it."""
    threads: int = 1
    cpu_isa: str = "none"
    """Instruction set of the CPU kernels; "none" where they do not run."""
    tasks: list[Task] = field(default_factory=lambda: [Task.GENERATE])
    pooling: PoolingInfo | None = None
    """None: only tokens."""

    @property
    def max_prompt_len(self) -> int:
        """Of a request that is pooled. A decoder has one token less: its step ends in another."""
        return self.max_model_len - (Task.GENERATE in self.tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's gauges after its last step, and its counters since it started."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    oom_retries: int = 0
    """Times a step, or half of one, was computed in two for want of GPU memory."""
    steps: int = 0
    step_tokens: int = 0
    """Tokens computed by the last step."""
    last_step_time: float = 0.0
    """time.monotonic() at which the last step ended (or the engine was last seen idle)."""
    resident_bytes: int = 0


@dataclass(slots=True)
class StepOutputs:
    """All that one step found. The common case, a row that got one plain token, is columns."""

    handles: list[int]
    token_ids: list[int]
    """[len(handles)]"""
    details: list[RequestOutput]
    """Rows with more to say than a token: first tokens, log-probabilities, ends, errors."""
    stats: EngineStats | None = None


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait for its first token before new requests are refused with 429."""

    max_queued_requests: int
    max_queued_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What an engine has to do, of all API processes that share it, and how fast it does it."""

    live: int
    """Requests between their arrival and their end."""
    queued_tokens: int
    """Prompt tokens of those without a first token."""
    prefill_tokens_per_s: float
    """Of steps that compute prompts; 0.0 until there was one."""
    decode_step_s: float
    """Seconds of a step without prompts; 0.0 until there was one."""


class EngineState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"


class RequestStream(Protocol):
    """The outputs of one request. Close it (or leave its `async for`) and the engine forgets it."""

    request_id: str

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput:
        """The next output; coalesces all that arrived meanwhile. After the one that carries a
        finish_reason: StopAsyncIteration. Raises EngineError if the engine is lost for good."""
        ...

    async def read(self, on_output: Callable[[RequestOutput], None]) -> None:
        """Call `on_output` with every output as it comes; return after the last one, or when the
        request was aborted. The same as `async for`, without waking a task for each. Raises as
        that does, and what `on_output` raises; it must not wait."""
        ...

    def abort(self) -> None:
        """Free the request's blocks by the next step. Idempotent; harmless after the end."""
        ...


class EngineClient(Protocol):
    @property
    def state(self) -> EngineState: ...

    @property
    def info(self) -> ModelInfo | None:
        """None until the engine was ready for the first time."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def workload(self) -> Workload: ...

    @property
    def last_seen_age(self) -> float:
        """Seconds since the engine last ended a step or said that it is idle."""
        ...

    @property
    def restarts(self) -> int: ...

    async def start(self) -> None:
        """Start loading; returns at once."""
        ...

    async def wait_ready(self) -> ModelInfo:
        """Raises EngineError, with the engine's own message, if it cannot load."""
        ...

    def submit(self, request: GenerateRequest) -> RequestStream:
        """Queue a request. Raises OverloadedError when the bounded queue is full, UnavailableError
        when not ready, and a RequestError for token ids or lengths that the model cannot take."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Drop cached blocks that nobody uses. False when requests are running."""
        ...

    async def close(self) -> None: ...
