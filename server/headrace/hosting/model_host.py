"""One model that is served: the client of its engine and its text side, from start to end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from headrace import __version__
from headrace.api.model_table import ServedModel
from headrace.config import EngineConfig, ServerOptions
from headrace.engine.attached_client import AttachedEngineClient
from headrace.engine.client import EngineStats, ModelInfo, QueueLimits, RequestRecord
from headrace.engine.process_client import ProcessEngineClient
from headrace.engine.queue_board import QueueBoard
from headrace.errors import HeadraceError
from headrace.hosting.model_files import find_model
from headrace.loading.checkpoint import open_checkpoint
from headrace.observability.metrics import Metrics
from headrace.text.processor import TextProcessor

Progress = Callable[[int, int], None]


class ServedFacts(NamedTuple):
    """For people who start a server."""

    names: Sequence[str]
    """The model's, aliases last."""
    path: Path
    """Of its files."""
    info: ModelInfo
    text_formats: str


class Sharing(NamedTuple):
    """What an API process has in common with others that serve the same engine."""

    engine_path: Path
    """Of the socket at which engines accept."""
    board: QueueBoard
    find_model: Callable[[], Awaitable[Path]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEvents:
    """Who hears of an engine."""

    on_record: Callable[[RequestRecord], None]
    on_stats: Callable[[EngineStats], None] = lambda stats: None
    on_progress: Progress = lambda read, total: None
    on_dead: Callable[[HeadraceError], None] = lambda error: None
    """It is lost for good."""


class ModelHost:
    """One model: `model` is its entry in the table, there before it is loaded."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServerOptions,
        names: Sequence[str],
        events: HostEvents,
        *,
        revision: str = "",
        version: int | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """`names`: aliases last. `sharing`: an engine that is started elsewhere."""
        self.path = Path()
        """Of the model's files, once they are found."""
        self.client: ProcessEngineClient | AttachedEngineClient
        if sharing is None:
            self.client = ProcessEngineClient(
                config,
                limits=queue_limits(options),
                step_timeout=options.step_timeout,
                log_level=options.log_level,
                log_format=options.log_format,
                on_record=events.on_record,
                on_stats=events.on_stats,
                on_progress=events.on_progress,
                on_dead=events.on_dead,
            )
        else:
            self.client = AttachedEngineClient(
                sharing.engine_path,
                limits=queue_limits(options),
                board=sharing.board,
                on_record=events.on_record,
            )
        self.model = ServedModel(
            name=names[0],
            client=self.client,
            aliases=tuple(names[1:]),
            revision=revision,
            version=version,
        )
        self._config = config
        self._options = options

    async def start(self, path: Path) -> ModelInfo:
        """Start the engine and read the text side meanwhile; returns when requests can come.

        Raises CheckpointError, ConfigError or EngineError for a model that cannot be served.
        """
        self.path = path
        if isinstance(self.client, ProcessEngineClient):
            self.client.config = replace(self._config, model=str(path))
        await self.client.start()
        checkpoint = await asyncio.to_thread(open_checkpoint, path)
        text = await asyncio.to_thread(
            TextProcessor.from_assets,
            checkpoint.tokenizer,
            template_file=self._config.model_options.chat_template,
        )
        text.choose_parsers(self._options.tool_call_parser, self._options.reasoning_parser)
        self.client.tokenizer_json = await asyncio.to_thread(text.tokenizer.to_json)
        self.model.text = text
        self.model.digest = await asyncio.to_thread(lambda: checkpoint.digest)
        return await self.client.wait_ready()

    def facts(self) -> ServedFacts:
        """What is served, once it is."""
        assert self.client.info is not None, "ready means that the engine has described itself"
        names = (self.model.name, *self.model.aliases)
        return ServedFacts(names, self.path, self.client.info, self.text_formats())

    def text_formats(self) -> str:
        """What is read out of the model's output, for the start-up log."""
        text, _ = self.model.loaded()
        calls = text.tool_calls.name if text.tool_calls else "none"
        reasoning = text.reasoning.name if text.reasoning else "none"
        return f"tool calls: {calls}; reasoning: {reasoning}"

    async def close(self) -> None:
        """Ends live requests with an error, and the engine, if it is this host's own."""
        await self.client.close()


class SingleModel:
    """The models of a process that serves one."""

    def __init__(
        self, host: ModelHost, config: EngineConfig, metrics: Metrics, sharing: Sharing | None
    ) -> None:
        self.host = host
        self._config = config
        self._metrics = metrics
        self._sharing = sharing
        if sharing is None:
            metrics.attach_engine(host.client)

    async def start(self) -> ModelInfo:
        """Find the model, downloading it if it is on a hub, and load it. Raises what its host
        raises."""
        sharing = self._sharing
        path = await (sharing.find_model() if sharing else find_model(self._config))
        info = await self.host.start(path)
        if sharing is None:
            show_model(self._metrics, info, self.host.model.digest, self.host.model.revision)
        return info

    @property
    def num_live(self) -> int:
        return self.host.client.num_live

    async def close(self) -> None:
        await self.host.close()


def queue_limits(options: ServerOptions) -> QueueLimits:
    return QueueLimits(options.max_queued_requests, options.max_queued_tokens)


def show_model(metrics: Metrics, info: ModelInfo, digest: str, revision: str) -> None:
    metrics.set_model_info(
        version=__version__,
        digest=digest,
        revision=revision,
        dtype=info.dtype,
        device=info.device,
    )


def keep_out_of_collections() -> None:
    """What the libraries made stays. Each full collection looked through it again, for 80 ms in
    which no token is sent. Called again, it frees what has gone since."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
