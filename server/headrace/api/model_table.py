"""Which models this process serves, by name: an engine client, its text side and its identity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

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
            raise UnavailableError(
                f"The model {self.name!r} is still loading; try again soon, or wait for /readyz.",
                retry_after=2.0,
            )
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


class ModelTable:
    """The served models in the order they were added; the first one is the default."""

    def __init__(self, *models: ServedModel) -> None:
        self._models: list[ServedModel] = list(models)

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

    def find(self, name: str | None) -> ServedModel:
        """By name or alias; no name means the default. Raises ModelNotFoundError."""
        if not name and self._models:
            return self._models[0]
        for model in self._models:
            if name == model.name or name in model.aliases:
                return model
        served = ", ".join(repr(model.name) for model in self._models) or "none yet"
        raise ModelNotFoundError(
            f"The model {_shortened(name or '')!r} is not served here. Served: {served}.",
            param="model",
        )


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."
