"""What the door is told: models, where their replicas are, and how to listen.

One YAML file, or `--replica NAME=URL` flags. Data only; nothing here connects to anything.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from headrace.config import MIB, nearest_hint, parse_size
from headrace.errors import ConfigError


class Backend(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where requests can go: an application that a source knows, replicas by their URLs, or a URL
    whose host has an address per replica, such as a headless Service."""

    application: str = ""
    replicas: tuple[str, ...] = ()
    service: str = ""


class Canary(Backend, frozen=True, kw_only=True):
    weight: float = 0.0
    """Part of the model's requests, 0 to 1."""


class Shadow(Backend, frozen=True, kw_only=True):
    share: float = 0.0
    """Part of the model's requests that is mirrored, 0 to 1."""


class Wake(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What requests do while their model has no replica."""

    queue: int = 100
    """So many wait; more are answered 503."""
    deadline_s: float = 120.0
    """So long each waits."""


class ModelRoute(Backend, frozen=True, kw_only=True):
    """One name that clients may ask for."""

    aliases: tuple[str, ...] = ()
    canary: tuple[Canary, ...] = ()
    shadow: Shadow | None = None
    wake: Wake | None = None


class RayAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    address: str = ""
    """Of the cluster, for the registry of replicas."""
    dashboard: str = ""
    """URL of Ray's dashboard, for Serve's REST API."""


class RouteConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that `headrace route` is told. The keys of its YAML file."""

    models: dict[str, ModelRoute] = {}
    default: str = ""
    """The model of requests that name none; default: the first."""
    ray: RayAddress | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    api_key: str | None = None
    max_body_bytes: int | str = 32 * MIB
    shutdown_timeout: float = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @property
    def default_model(self) -> str:
        return self.default or next(iter(self.models), "")


MAX_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A backend under the name by which sources report its replicas."""

    name: str
    backend: Backend


def targets(config: RouteConfig) -> Iterator[Target]:
    """Every backend: of the models, of their canaries and of their shadows."""
    for name, model in config.models.items():
        yield Target(target_name(name, model), model)
        for index, canary in enumerate(model.canary):
            yield Target(target_name(f"{name}/canary-{index}", canary), canary)
        if model.shadow is not None:
            yield Target(target_name(f"{name}/shadow", model.shadow), model.shadow)


def target_name(place: str, backend: Backend) -> str:
    """By which a backend's replicas are known: its application, or its place in the file."""
    return backend.application or place


def parse_config(content: Mapping[str, Any], *, origin: str) -> RouteConfig:
    """The configuration in a parsed YAML file. Raises ConfigError, which names key and `origin`."""
    try:
        config = msgspec.convert(dict(content), RouteConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(str(error))}") from None
    return _checked(config, origin)


def parse_replicas(flags: Sequence[str]) -> dict[str, ModelRoute]:
    """The models of `--replica NAME=URL` flags, in their order. Raises ConfigError."""
    found: dict[str, list[str]] = {}
    for flag in flags:
        name, separator, url = flag.partition("=")
        if not (separator and name and url):
            raise ConfigError(f"--replica {flag}: must be NAME=URL, as in llama=http://host:8000.")
        found.setdefault(name, []).append(url)
    return {name: ModelRoute(replicas=tuple(urls)) for name, urls in found.items()}


def with_changes(config: RouteConfig, *, origin: str, **changes: Any) -> RouteConfig:
    """`config` with the values of flags. Raises ConfigError."""
    return _checked(msgspec.structs.replace(config, **changes), origin)


def _checked(config: RouteConfig, origin: str) -> RouteConfig:
    if not config.models:
        raise ConfigError(
            f"{origin}: no models. Name at least one: 'models: {{NAME: {{replicas: [URL]}}}}', or "
            "--replica NAME=URL."
        )
    for target in targets(config):
        _check_backend(target, origin)
    _check_names(config, origin)
    for name, model in config.models.items():
        shares = [canary.weight for canary in model.canary]
        if model.shadow is not None and not 0 <= model.shadow.share <= 1:
            raise ConfigError(f"{origin}: models.{name}.shadow.share must be 0 to 1.")
        if any(share < 0 for share in shares) or sum(shares) > 1:
            raise ConfigError(f"{origin}: the canary weights of {name!r} must be 0 to 1 together.")
    if not 1 <= config.processes <= MAX_PROCESSES:
        raise ConfigError(f"{origin}: processes must be 1 to {MAX_PROCESSES}.")
    try:
        size = parse_size(str(config.max_body_bytes))
    except ValueError as error:
        raise ConfigError(f"{origin}: max_body_bytes: {error}.") from None
    return msgspec.structs.replace(config, max_body_bytes=size)


def _check_backend(target: Target, origin: str) -> None:
    backend = target.backend
    if [bool(backend.application), bool(backend.replicas), bool(backend.service)].count(True) != 1:
        raise ConfigError(
            f"{origin}: {target.name!r} needs one of 'replicas: [URL]', 'application: NAME' and "
            "'service: URL'."
        )
    for url in (*backend.replicas, *([backend.service] if backend.service else ())):
        split_url(url, origin)


def _check_names(config: RouteConfig, origin: str) -> None:
    names = set(config.models)
    for name, model in config.models.items():
        for alias in model.aliases:
            if alias in names:
                raise ConfigError(f"{origin}: models.{name}.aliases: {alias!r} is taken already.")
            names.add(alias)
    if config.default and config.default not in config.models:
        hint = nearest_hint(config.default, config.models)
        raise ConfigError(f"{origin}: default: there is no model {config.default!r}{hint}")


def split_url(url: str, origin: str) -> tuple[str, int]:
    """(host, port) of a replica. Raises ConfigError for what is not http://HOST[:PORT]."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ConfigError(
            f"{origin}: the replica {url!r} must be http://HOST:PORT, without a path."
        )
    return parts.hostname, port or 80


# --- messages ---------------------------------------------------------------------------------

_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$?\.?(.*)`)?")
_AT = re.compile(r" - at `\$\.?(.*)`$")


def _explain(message: str) -> str:
    """msgspec's complaint with the path as one would write it, and the nearest known key."""
    if match := _UNKNOWN.match(message):
        key, path = match[1], match[2] or ""
        known = _known_keys(path)
        return f"unknown key {key!r}{f' in {path}' if path else ''}{nearest_hint(key, known)}"
    text = _AT.sub("", message)
    path = match[1] if (match := _AT.search(message)) else ""
    return f"{path}: {text[:1].lower()}{text[1:]}." if path else f"{text}."


def _known_keys(path: str) -> tuple[str, ...]:
    """Of the object at msgspec's `path`, such as models[...].canary[0]."""
    kind: Any = RouteConfig
    for name in re.findall(r"[a-z_]\w*", path):
        hints = typing.get_type_hints(kind)
        kind = _struct_in(hints.get(name))
        if kind is None:
            return ()
    return tuple(kind.__struct_fields__)


def _struct_in(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (dict, tuple):
        found = (_struct_in(inner) for inner in typing.get_args(hint))
        return next((inner for inner in found if inner is not None), None)
    return None
