"""What `args` of an application in a Serve config file may be, and what is wrong with given ones.

The options are those of `headrace serve`: `config.py` is their one source, here as in the schema.
Knows nothing of Ray, so that a file can be checked where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.config import (
    EngineConfig,
    ServerOptions,
    load_options,
    nearest_hint,
    option_specs,
    parse_size,
)
from headrace.errors import ConfigError

NOT_OPTIONS = {
    "host": "under Ray Serve the proxies listen; give it as http_options.host at the top of the "
    "Serve config.",
    "port": "under Ray Serve the proxies listen; give it as http_options.port at the top of the "
    "Serve config.",
    "model": "give it as args.model, beside options.",
}
Port = Annotated[int, Field(ge=1, le=65535)]


def _options_schema(schema: dict[str, Any]) -> None:
    """JSON schema of `options`, for editors and values files: names, types, choices, defaults."""
    kinds = {int: "integer", float: "number", str: "string"}
    properties: dict[str, Any] = {}
    for spec in option_specs():
        if spec.name in NOT_OPTIONS:
            continue
        one: dict[str, Any] = {"type": kinds.get(spec.parse, "string")}  # type: ignore[call-overload]
        if spec.is_flag:
            one = {"type": "boolean"}
        elif spec.choices:
            one = {"enum": list(spec.choices)}
        elif spec.parse is parse_size:
            one = {"type": ["integer", "string"]}
        if spec.is_list:
            one = {"type": "array", "items": one}
        if spec.default not in (None, "", ()):
            one["default"] = spec.default
        properties[spec.name] = {**one, "description": spec.help}
    schema.update(type="object", properties=properties, additionalProperties=False)


class BuildArgs(BaseModel):
    """`args` of an application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        default="", description="As for `headrace serve`; every node must be able to resolve it."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of `headrace serve` by name, such as threads.",
        json_schema_extra=_options_schema,
    )
    replica_ports: tuple[Port, Port] | None = Field(
        default=None,
        description="The first and the last port that replicas may take for themselves on a node; "
        "default: any free one.",
    )

    def load(self) -> tuple[EngineConfig, ServerOptions]:
        """The configuration of a replica. Raises ConfigError with all that is wrong, one a line."""
        if problems := _problems_of(self):
            raise ConfigError("\n".join(problems))
        config, options, _ = load_options(self.model, {}, self.options)
        return config, options


def problems_in(args: Mapping[str, Any]) -> list[str]:
    """What is wrong with `args` as they stand in a file: each names the key and the remedy."""
    try:
        return _problems_of(BuildArgs.model_validate(args))
    except ValidationError as error:
        found = []
        for one in error.errors():
            path = ".".join(str(part) for part in one["loc"])
            if one["type"] == "extra_forbidden":
                found.append(
                    f"{path}: no such argument{nearest_hint(path, BuildArgs.model_fields)}"
                )
            else:
                found.append(f"{path}: {one['msg']}.")
        known = {key: args[key] for key in BuildArgs.model_fields if key in args}
        if len(known) < len(args):  # what has a known name is looked at, too
            found = [text for text in found if "no such argument" in text] + problems_in(known)
        return found


def _problems_of(args: BuildArgs) -> list[str]:
    found = []
    for name, value in args.options.items():
        key = name.replace("-", "_")
        if key in NOT_OPTIONS:
            found.append(f"options.{name}: {NOT_OPTIONS[key]}")
            continue
        try:  # alone, and without the environment: every error is found, and is the file's
            load_options("", {}, {name: value}, {})
        except ConfigError as error:
            found.append(f"options.{name}: {error.message}")
    if args.replica_ports is not None and args.replica_ports[0] > args.replica_ports[1]:
        found.append("replica_ports: the first port is above the last one.")
    if not found:
        config, options, _ = load_options(args.model, {}, args.options)
        for check in (lambda: check_options(options), lambda: resources_of(config)):
            try:
                check()
            except ConfigError as error:
                found.append(error.message)
    return found


def check_options(options: ServerOptions) -> None:
    """Raises ConfigError for what a replica cannot be."""
    if options.api_processes != 1:
        raise ConfigError(
            "options.api_processes: a replica is one API process; ask for more replicas instead."
        )


def resources_of(config: EngineConfig) -> dict[str, float]:
    """What Ray reserves for a replica, so that it places as many on a node as fit.

    Raises ConfigError for a device that is not Ray's to give.
    """
    device, _, index = config.device.device.partition(":")
    if index:
        raise ConfigError(
            f"options.device: {config.device.device}: Ray chooses the GPU of a replica; say cuda."
        )
    resources: dict[str, float] = {"num_cpus": config.device.threads or 1}
    if device == "cuda":
        resources["num_gpus"] = 1
    return resources
