"""The messages between API process and engine process: typed, versioned, binary (msgpack)."""

from __future__ import annotations

import msgspec

from headrace.engine.client import EngineStats, ModelInfo, StepOutputs
from headrace.sampling_params import GenerateRequest

WIRE_VERSION = 5


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    request: GenerateRequest
    handle: int
    """Names the request in StepOutputs; unique among the requests that live."""


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    request_id: str


class Spelling(msgspec.Struct, frozen=True, tag="spelling", array_like=True):
    """How tokens are spelled; comes before requests with grammars."""

    tokenizer_json: str


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache", array_like=True):
    pass


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    pass


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """The engine's first word; a client of another wire version refuses it."""

    wire_version: int
    pid: int


class LoadProgress(msgspec.Struct, frozen=True, tag="load_progress", array_like=True):
    bytes_read: int
    bytes_total: int


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    info: ModelInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", array_like=True):
    message: str
    user_error: bool
    """The model files or options are at fault: starting again cannot help."""


class StepDone(msgspec.Struct, frozen=True, tag="step", array_like=True):
    outputs: StepOutputs


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """Sent when the engine is idle, so that its age can be told from its death."""

    stats: EngineStats


class PrefixCacheReset(msgspec.Struct, frozen=True, tag="prefix_cache_reset", array_like=True):
    done: bool


ToEngine = Submit | Abort | Spelling | ResetPrefixCache | Shutdown
FromEngine = Hello | LoadProgress | Ready | LoadFailed | StepDone | Heartbeat | PrefixCacheReset
