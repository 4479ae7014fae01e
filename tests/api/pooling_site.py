"""An application whose engine makes vectors: of a text, a function of its tokens and no other."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from headrace.api.api_config import ApiConfig
from headrace.api.app import create_app
from headrace.api.model_table import ModelTable, ServedModel
from headrace.engine.client import (
    EngineState,
    EngineStats,
    FinishReason,
    ModelInfo,
    PoolingInfo,
    QueueLimits,
    RequestOutput,
    RequestRecord,
    StepOutputs,
    Task,
    Workload,
)
from headrace.engine.live_requests import LiveRequests, LiveStream
from headrace.errors import HeadraceError
from headrace.observability.metrics import Metrics
from headrace.sampling_params import GenerateRequest
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

CLS, SEP = 256, 257
SIZE = 8
LENGTH = 64
EMBEDDER = [Task.EMBED, Task.SCORE]


def pair_tokenizer() -> Tokenizer:
    """A token a byte, between [CLS] and [SEP]; the second text of a pair is of type 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    marks = ("[CLS]", "[SEP]")
    fast.add_tokens([AddedToken(text, special=True, normalized=False) for text in marks])
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    # As in checkpoints of sentence-transformers: it is not the server's.
    fast.enable_truncation(5)
    fast.enable_padding(length=5)
    return Tokenizer(fast, {"cls_token": marks[0], "sep_token": marks[1]})


@dataclass
class PoolingEngine:
    """An EngineClient. An embedding has the number of the tokens in places that are equal modulo
    SIZE; the logits of a classifier are those of its labels' first letters, less 1."""

    tokenizer: Tokenizer
    tasks: list[Task] = field(default_factory=lambda: list(EMBEDDER))
    labels: list[str] = field(default_factory=list)
    activation: Any = "sigmoid"
    matryoshka: bool = False
    limits: QueueLimits = QueueLimits(64, 100_000)
    hold: bool = False
    fail: str | None = None
    refuse: HeadraceError | None = None
    state: EngineState = EngineState.READY
    stats: EngineStats = EngineStats()
    restarts: int = 0
    last_seen_age: float = 0.0
    tokenizer_json: str = ""
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    on_record: Callable[[RequestRecord], None] = lambda record: None

    def __post_init__(self) -> None:
        self.live = LiveRequests(self.limits, on_abort=self.aborted.append, on_end=self._record)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            max_model_len=LENGTH,
            vocab_size=self.tokenizer.vocab_size,
            eos_token_ids=[],
            num_blocks=0,
            block_size=16,
            max_num_seqs=8,
            dtype="float32",
            device="cpu",
            weight_bytes=1,
            kv_cache_bytes=0,
            load_seconds=0.0,
            kernels={},
            tasks=self.tasks,
            pooling=PoolingInfo(
                pooling="mean",
                normalize=True,
                dimensions=SIZE,
                matryoshka=self.matryoshka,
                labels=self.labels,
                score_activation=self.activation,
            ),
        )

    @property
    def workload(self) -> Workload:
        return self.live.queue.workload

    def submit(self, request: GenerateRequest) -> LiveStream:
        if self.refuse is not None:
            raise self.refuse
        _, stream = self.live.admit(request, self.info)
        self.requests.append(request)
        self.most_in_flight = max(self.most_in_flight, len(self.live))
        if not self.hold:
            asyncio.get_running_loop().call_later(0.001, self._finish, stream)
        return stream

    def _finish(self, stream: LiveStream) -> None:
        request = stream.request
        reason = FinishReason.ERROR if self.fail else FinishReason.STOP
        record = RequestRecord(
            request_id=request.request_id,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=0,
            cached_tokens=0,
            preemptions=0,
            arrival_time=request.arrival_time,
            scheduled_time=request.arrival_time,
            first_token_time=0.0,
            finished_time=time.monotonic(),
        )
        output = RequestOutput(
            request_id=request.request_id,
            finish_reason=reason,
            vector=None if self.fail else self._vector(request),
            error=self.fail,
            record=record,
        )
        self.live.deliver(StepOutputs([], [], [output]))

    def _vector(self, request: GenerateRequest) -> bytes:
        assert request.pooling is not None
        ids = request.prompt_token_ids
        if request.pooling.task == "classify":
            first = [self.tokenizer.encode(label)[1] for label in self.labels]
            # A cross-encoder's one label: how many tokens the second text has from the first.
            if request.pooling.second_text is not None:
                at = request.pooling.second_text
                return struct.pack("<f", sum(token in ids[1 : at - 1] for token in ids[at:-1]))
            return struct.pack(f"<{len(first)}f", *(ids.count(token) - 1.0 for token in first))
        values = [float(sum(token % SIZE == place for token in ids)) for place in range(SIZE)]
        values = values[: request.pooling.dimensions]
        length = sum(value * value for value in values) ** 0.5 if request.pooling.normalize else 1
        return struct.pack(f"<{len(values)}f", *(value / length for value in values))

    def _record(self, record: RequestRecord) -> None:
        self.on_record(record)


@dataclass
class PoolingSite:
    app: Any
    engine: PoolingEngine
    metrics: Metrics

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"headrace_{name}", labels) or 0.0


def pooling_site(name: str = "tiny", strict_fields: bool = False, **engine: Any) -> PoolingSite:
    tokenizer = pair_tokenizer()
    client = PoolingEngine(tokenizer, **engine)
    model = ServedModel(name=name, client=client, text=TextProcessor(tokenizer))  # type: ignore[arg-type]
    metrics = Metrics(name)
    config = ApiConfig(version="1.2.3", strict_fields=strict_fields)
    app = create_app(ModelTable(model), config, metrics)
    client.on_record = app.state.services.ledger.close
    return PoolingSite(app, client, metrics)
