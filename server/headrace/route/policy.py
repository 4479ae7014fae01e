"""Which application a request for a model goes to: the model's own, or a canary; and whether it is
mirrored.

The choice is a hash of the session (or of the request, where there is none), so that a session
stays where it is, in every door and after a restart.
"""

from __future__ import annotations

import hashlib

from headrace.route.asked import Asked, Kind
from headrace.route.config import ModelRoute, RouteConfig, target_name

_KEYS = 1 << 64


class Policy:
    """Names and aliases of models; each request to its model's own application, or a canary."""

    def __init__(self, config: RouteConfig) -> None:
        self._names = {name: name for name in config.models}
        for name, model in config.models.items():
            self._names.update(dict.fromkeys(model.aliases, name))
        self._models = config.models
        self._splits = {name: _Split(name, model) for name, model in config.models.items()}

    def model(self, asked_for: str) -> str | None:
        """The model that clients mean by a name or an alias; None if there is none."""
        return self._names.get(asked_for)

    def applications(self, name: str, asked: Asked) -> tuple[str, ...]:
        """By which the fleet knows the replicas that are to answer `asked`; the second one's do
        where the first one has none. What names no model goes past canaries."""
        main = self.main_application(name)
        canary = self._splits[name].canary(_key_of(asked)) if asked.kind is Kind.MODEL else None
        return (main,) if canary is None else (canary, main)

    def shadow(self, name: str, asked: Asked) -> str | None:
        """The application to which `asked` is mirrored, too; None if to none."""
        return self._splits[name].shadow(_key_of(asked))

    def main_application(self, name: str) -> str:
        model: ModelRoute = self._models[name]
        return target_name(name, model)

    @property
    def names(self) -> dict[str, str]:
        """Every name and alias -> model."""
        return self._names


class _Split:
    """The parts of one model's requests."""

    def __init__(self, name: str, model: ModelRoute) -> None:
        self._canaries: list[tuple[str, str, float]] = []
        left = 1.0
        for index, canary in enumerate(model.canary):
            place = f"{name}/canary-{index}"
            # Of those that no canary before it takes. Each hashes for itself: a weight that grows
            # takes requests from the model's own application, and hardly any from other canaries.
            part = min(canary.weight / left, 1.0) if left > 0 else 0.0
            self._canaries.append((target_name(place, canary), place, part))
            left -= canary.weight
        self._shadow, self._share, self._place = "", 0.0, f"{name}/shadow"
        if model.shadow is not None:
            self._shadow = target_name(self._place, model.shadow)
            self._share = model.shadow.share

    def canary(self, key: str) -> str | None:
        for target, place, part in self._canaries:
            if part > 0 and position(place, key) < part:
                return target
        return None

    def shadow(self, key: str) -> str | None:
        if self._share > 0 and position(self._place, key) < self._share:
            return self._shadow
        return None


def position(place: str, key: str) -> float:
    """Of `key` among all keys, 0 to 1, for one place in the configuration: independent of its
    position for others, and the same in every process."""
    text = f"{place}\0{key}".encode(errors="replace")
    digest = hashlib.blake2b(text, digest_size=8, person=b"headrace-route").digest()
    return int.from_bytes(digest, "little") / _KEYS


def _key_of(asked: Asked) -> str:
    return asked.session or asked.request_id
