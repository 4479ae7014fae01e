"""Which models this process serves, by name: an engine client, its text side and its identity."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from headrace.engine.client import EngineClient, EngineState, ModelInfo, Task
from headrace.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from headrace.text.processor import TextProcessor

_ROUTES = {
    Task.GENERATE: "/v1/chat/completions and /v1/completions",
    Task.EMBED: "/v1/embeddings",
    Task.CLASSIFY: "/v1/moderations",
    Task.SCORE: "/v1/score and /v1/rerank",
}
_KINDS = {
    Task.GENERATE: "a language model",
    Task.EMBED: "a language model or an encoder without a classifier",
    Task.CLASSIFY: "a text classifier (an architecture that ends in ForSequenceClassification)",
    Task.SCORE: "an encoder, a language model, or a classifier of one label",
}


@dataclass(slots=True, kw_only=True, eq=False)
class ServedModel:
    """One entry. `text` and `digest` are filled in when the model has been read."""

    name: str
    client: EngineClient
    text: TextProcessor | None = None
    digest: str = ""
    """Of weights, tokenizer and template together, in hex."""
    revision: str = ""
    version: int | None = None
    """Of a versioned folder; its number."""
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def ready(self) -> bool:
        return self.text is not None and self.client.state is EngineState.READY

    @property
    def fingerprint(self) -> str | None:
        """OpenAI's system_fingerprint: equal for equal weights, tokenizer and template."""
        return f"fp_{self.digest.removeprefix('sha256:')[:16]}" if self.digest else None

    def loaded(self) -> tuple[TextProcessor, ModelInfo]:
        """The text side and the engine's description. Raises UnavailableError while loading."""
        info = self.client.info
        if self.text is None or info is None:
            raise _still_loading(self.name)
        return self.text, info

    def loaded_for(self, task: Task) -> tuple[TextProcessor, ModelInfo]:
        """As `loaded`. Raises InvalidRequestError for what this model cannot be asked."""
        text, info = self.loaded()
        if task not in info.tasks:
            routes = ", ".join(_ROUTES[own] for own in info.tasks)
            raise InvalidRequestError(
                f"The model {self.name!r} is not for this ({task}): it takes {routes}. Send this "
                f"to a server of {_KINDS[task]}.",
                param="model",
                code="unsupported_task",
            )
        return text, info


@dataclass(frozen=True, slots=True, kw_only=True)
class UnservedVersion:
    """A version of a model that is told of, but takes no requests."""

    name: str
    version: int
    state: Literal["loading", "draining", "failed"]
    reason: str = ""
    """Why it failed."""


class ModelTable:
    """The served models in the order they were added; the first one is the default."""

    def __init__(self, *models: ServedModel, expected: tuple[str, ...] = ()) -> None:
        """`expected`: names that are always served, or will be soon."""
        self._models: list[ServedModel] = list(models)
        self._expected = expected
        self.unserved: tuple[UnservedVersion, ...] = ()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def add(self, model: ServedModel) -> None:
        """Serve `model`, in place of one of the same name."""
        self._models = [*(other for other in self._models if other.name != model.name), model]

    def remove(self, name: str) -> None:
        """Stop serving `name`; requests that hold the entry go on."""
        self._models = [model for model in self._models if model.name != name]

    def replace(self, models: Iterable[ServedModel], unserved: Iterable[UnservedVersion]) -> None:
        """Serve these from now on; requests that hold other entries go on."""
        self._models, self.unserved = list(models), tuple(unserved)

    def find(self, name: str | None) -> ServedModel:
        """By name or alias; no name means the default. Raises ModelNotFoundError, or
        UnavailableError for one that is yet to come."""
        if not name and self._models:
            return self._models[0]
        for model in self._models:
            if name == model.name or name in model.aliases:
                return model
        loading = [other.name for other in self.unserved if other.state == "loading"]
        if name in (*self._expected, *loading) or (self._expected and not name):
            raise _still_loading(name or self._expected[0])
        served = ", ".join(repr(model.name) for model in self._models) or "none yet"
        raise ModelNotFoundError(
            f"The model {_shortened(name or '')!r} is not served here. Served: {served}.",
            param="model",
        )


def _still_loading(name: str) -> UnavailableError:
    return UnavailableError(
        f"The model {name!r} is still loading; try again soon, or wait for /readyz.",
        retry_after=2.0,
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."
