"""What the door says of its models, in OpenAI's shape plus their state."""

from __future__ import annotations

from typing import Any

from headrace.config import nearest_hint
from headrace.errors import ModelNotFoundError
from headrace.route.config import RouteConfig, target_name
from headrace.route.fleet import Fleet, Replica
from headrace.route.http_text import OwnAnswer, json_answer
from headrace.route.policy import Policy


def models(config: RouteConfig, policy: Policy, fleet: Fleet) -> dict[str, Any]:
    """For GET /v1/models: every name and alias, whether it has a replica now or not."""
    data = [_card(config, fleet, name, model) for name, model in policy.names.items()]
    return {"object": "list", "data": data}


def model(config: RouteConfig, policy: Policy, fleet: Fleet, name: str) -> dict[str, Any]:
    """For GET /v1/models/{name}: with its replicas. Raises ModelNotFoundError."""
    found = policy.model(name)
    if found is None:
        raise ModelNotFoundError(unknown_model(policy, name), param="model")
    replicas = [
        {"url": it.url, "state": it.state, "in_flight": it.view.in_flight}
        for it in _replicas(config, fleet, found)
    ]
    return {**_card(config, fleet, name, found), "replicas": replicas}


def unknown_model(policy: Policy, name: str) -> str:
    """A sentence for people who ask for what there is not."""
    known = list(policy.names)
    hint = nearest_hint(name, known).removesuffix(".").removesuffix("?")
    sentence = f"The model {name[:200]!r} does not exist{hint}"
    return f"{sentence}{'?' if hint else '.'} Served: {', '.join(known)}."


def readiness(config: RouteConfig, fleet: Fleet, *, draining: bool) -> OwnAnswer:
    """For GET /readyz: ready while any model has a replica, or wakes one."""
    if draining:
        return json_answer({"status": "draining"}, 503)
    states = {name: _state(config, fleet, name) for name in config.models}
    ready = any(state != "unavailable" for state in states.values())
    status = "ready" if ready else "no replica"
    return json_answer({"status": status, "models": states}, 200 if ready else 503)


def _replicas(config: RouteConfig, fleet: Fleet, name: str) -> list[Replica]:
    return fleet.applications.get(target_name(name, config.models[name]), [])


def _state(config: RouteConfig, fleet: Fleet, name: str) -> str:
    if any(it.usable for it in _replicas(config, fleet, name)):
        return "ready"
    return "asleep" if config.models[name].wake is not None else "unavailable"


def _card(config: RouteConfig, fleet: Fleet, name: str, model_name: str) -> dict[str, Any]:
    """As a replica tells it, under the door's name."""
    told = [it for it in _replicas(config, fleet, model_name) if it.cards]
    best = min(told, key=lambda it: not it.usable, default=None)
    card: dict[str, Any] = {"object": "model", "created": 0, "owned_by": "headrace"}
    card |= best.cards[0] if best is not None else {}
    return card | {"id": name, "root": model_name, "state": _state(config, fleet, model_name)}
