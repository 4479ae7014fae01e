"""A Serve config file: what it says of our applications, and all that is wrong with it.

Ray ignores keys that it does not know; here each is an error, as a typo is what they mostly are.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from headrace.config import load_options, nearest_hint
from headrace.deploy import autoscaling
from headrace.deploy.build_args import problems_in, resources_of
from headrace.errors import ConfigError

OURS = "headrace.deploy.ray_serve:build_app"
DEPLOYMENT = "headrace"
"""The one deployment of each of our applications."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the replicas of an application of ours ask a cluster for."""

    where: str
    """In the file, such as applications[0]."""
    application: str
    resources: Mapping[str, float]
    """Of one replica, as Ray counts: CPU, GPU and custom ones."""
    replicas: int
    """From the start."""
    surge: bool
    """A rollout starts new replicas beside the old ones."""
    says_threads: bool
    model: str


@dataclass(frozen=True, slots=True)
class ServeFile:
    content: dict[str, Any]
    """As Ray's REST takes it."""
    demands: tuple[Demand, ...] = field(default=())


def read(path: str) -> ServeFile:
    """Raises ConfigError with everything that is wrong, a line each, with its place."""
    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a Serve config: a mapping with `applications`.")
    problems, demands = check(content)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return ServeFile(content, tuple(demands))


def check(content: dict[str, Any]) -> tuple[list[str], list[Demand]]:
    """What is wrong with a Serve config, and, if nothing is, what it asks for."""
    from ray.serve.schema import ServeDeploySchema

    problems = list(_unknown_keys(content, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        for one in error.errors():
            problems.append(f"{_path(one['loc'])}: {one['msg'].removeprefix('Value error, ')}.")
    demands = []
    applications = content.get("applications")
    for index, application in enumerate(applications if isinstance(applications, list) else []):
        if not isinstance(application, dict) or application.get("import_path") != OURS:
            continue
        where = f"applications[{index}]"
        args = application.get("args") or {}
        if not isinstance(args, dict):
            problems.append(f"{where}.args: must be a mapping with model and options.")
            continue
        found = [f"{where}.args.{problem}" for problem in problems_in(args)]
        found += _wrong_deployments(application, where)
        problems += found
        if not problems:
            demands.append(_demand(application, where))
    return problems, demands


def _path(location: Iterable[Any]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "the file"


def _unknown_keys(value: Any, kind: Any, path: str) -> Iterable[str]:
    """Keys that `kind`, an annotation of Ray's schema, does not have."""
    if isinstance(value, list):
        (of,) = [*typing.get_args(kind), None][:1]
        for index, item in enumerate(value):
            yield from _unknown_keys(item, of, f"{path}[{index}]")
    if not isinstance(value, dict):
        return
    models = [k for k in (kind, *typing.get_args(kind)) if _is_model(k)]
    if len(models) != 1:  # free, such as args, or one of several forms
        return
    fields = models[0].model_fields
    names = set(fields) | {f.alias for f in fields.values() if f.alias}
    for key, item in value.items():
        where = f"{path}.{key}".removeprefix(".")
        if key not in names:
            yield f"{where}: Ray's Serve schema has no such key{nearest_hint(str(key), names)}"
        elif key in fields:
            yield from _unknown_keys(item, _listless(fields[key].annotation), where)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _listless(kind: Any) -> Any:
    """Optional[List[X]] -> List[X]; the rest as it is."""
    lists = [one for one in typing.get_args(kind) if typing.get_origin(one) is list]
    return lists[0] if lists else kind


def _wrong_deployments(application: Mapping[str, Any], where: str) -> Iterable[str]:
    deployments = application.get("deployments")
    for index, one in enumerate(deployments if isinstance(deployments, list) else []):
        name = one.get("name") if isinstance(one, dict) else None
        if name is not None and name != DEPLOYMENT:
            yield (
                f"{where}.deployments[{index}].name: the application has one deployment, "
                f"{DEPLOYMENT!r}; there is no {name!r}."
            )
        scaling = one.get("autoscaling_config") if isinstance(one, dict) else None
        for problem in autoscaling.problems(scaling) if isinstance(scaling, dict) else ():
            yield f"{where}.deployments[{index}].autoscaling_config.{problem}"


def _demand(application: Mapping[str, Any], where: str) -> Demand:
    args = application.get("args") or {}
    config, _, _ = load_options(args.get("model", ""), {}, args.get("options") or {})
    overrides: dict[str, Any] = {}
    for one in application.get("deployments") or []:
        overrides.update(one)
    given = overrides.get("ray_actor_options")
    # What stands under deployments replaces the whole of what the application sets.
    options: dict[str, Any] = (
        {**resources_of(config)} if given is None else {"num_cpus": 1.0, **given}
    )
    bundles = overrides.get("placement_group_bundles")
    resources = {
        "CPU": float(options.get("num_cpus") or 0),
        "GPU": float(options.get("num_gpus") or 0),
        **{name: float(count) for name, count in (options.get("resources") or {}).items()},
    }
    if bundles and overrides.get("placement_group_strategy") == "STRICT_PACK":
        resources = {}
        for bundle in bundles:
            for name, count in bundle.items():
                resources[name] = resources.get(name, 0.0) + float(count)
    scaling = overrides.get("autoscaling_config") or {}
    replicas = overrides.get("num_replicas", 1)
    if scaling or not isinstance(replicas, int):  # "auto" begins with one
        replicas = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    return Demand(
        where=where,
        application=application.get("name", "default"),
        resources={name: count for name, count in resources.items() if count},
        replicas=replicas,
        surge=overrides.get("max_surge_percent", 100) > 0,
        says_threads=config.device.threads is not None,
        model=config.model,
    )
