"""Which application a request for a model goes to."""

from __future__ import annotations

from headrace.route.asked import Asked
from headrace.route.config import ModelRoute, RouteConfig, target_name


class Policy:
    """Names and aliases of models; each request to its model's own application."""

    def __init__(self, config: RouteConfig) -> None:
        self._names = {name: name for name in config.models}
        for name, model in config.models.items():
            self._names.update(dict.fromkeys(model.aliases, name))
        self._models = config.models

    def model(self, asked_for: str) -> str | None:
        """The model that clients mean by a name or an alias; None if there is none."""
        return self._names.get(asked_for)

    def application(self, name: str, asked: Asked) -> str:
        """By which the fleet knows the replicas that are to answer `asked`."""
        return self.main_application(name)

    def main_application(self, name: str) -> str:
        model: ModelRoute = self._models[name]
        return target_name(name, model)

    @property
    def names(self) -> dict[str, str]:
        """Every name and alias -> model."""
        return self._names
