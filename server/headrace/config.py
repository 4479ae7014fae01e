"""Every option, its default, and where a given value comes from.

This is the only file that reads the environment; engine/resolution.py chooses the open values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


def option(default: Any, help_text: str, **extra: Any) -> Any:
    """A dataclass field that is also a command-line option and a key of the YAML file."""
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Type of weights, GEMM inputs and KV cache; auto asks model and device, and keeps "
        "quantized weights as they are where it can.",
    )
    quantization: Literal["auto", "fp8", "int8"] = option(
        "auto",
        "Round weights to 8 bits as they are loaded, and their inputs as they come; auto leaves "
        "them as the checkpoint has them.",
    )
    weights: Literal["packed", "exact", "dense"] = option(
        "packed",
        "How quantized weights are kept: exact rounds neither their inputs to 8 bits nor scales; "
        "dense dequantizes them.",
    )
    max_model_len: int | None = option(
        None, "Tokens of prompt plus output a request may have; default: what the model allows."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = option(
        "auto", "Which hidden states are an embedding; auto asks modules.json."
    )
    chat_template: str | None = option(None, "A Jinja file that replaces the model's template.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    kv_cache_memory_bytes: int | None = option(
        None, "Memory for the KV cache, such as 2GiB; default: a share of what is free.", size=True
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = option(
        "auto",
        "Type of the KV cache; auto is that of --dtype, int8 and (on a GPU) fp8 take about half.",
    )
    block_size: int | None = option(None, "Tokens per KV block; default 16 on a CPU, 64 on a GPU.")
    enable_prefix_caching: bool = option(True, "Share the KV of equal prompt prefixes.")
    prefix_cache_key: str = option(
        "", "Secret that keys block hashes; replicas with the same one agree on them.", secret=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    max_num_seqs: int | None = option(None, "Requests that run at the same time.")
    max_num_batched_tokens: int | None = option(
        None, "Token budget of one step: longer prompts are computed in chunks."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU where there is one.")
    threads: int | None = option(None, "CPU threads of the engine; default: the cores it may use.")
    cpu_isa: Literal["auto", "avx512", "avx2", "scalar"] = option(
        "auto", "Instruction set of the CPU kernels; auto takes the best that this CPU has."
    )
    deterministic: bool = option(
        False, "Only kernels by which a request gets the same tokens in any batch, or fail."
    )
    kernel: tuple[str, ...] = option(
        (), "STEM=NAME: use this kernel for an op, or fail; may be given more than once."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process is told."""

    model: str = ""
    model_options: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    device: DeviceOptions = DeviceOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the API process is told."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    api_processes: int = option(1, "Processes that answer HTTP, on one port and with one engine.")
    served_model_name: tuple[str, ...] = option(
        (), "Name of the model in the API; more than one are aliases."
    )
    model_versions: str = option(
        "latest", "Of a model's numbered folders: latest, all, or numbers such as 2,3."
    )
    model_poll_interval: float = option(
        1.0, "Seconds between two looks at the folders of a model's versions."
    )
    api_key: str | None = option(None, "Clients must send it as a Bearer token.", secret=True)
    max_queued_requests: int = option(1024, "Requests that may wait; more are answered 429.")
    max_queued_tokens: int = option(4_000_000, "Prompt tokens that may wait.")
    max_body_bytes: int = option(32 * MIB, "Larger request bodies are answered 413.", size=True)
    data_dir: str | None = option(
        None, "Folder of files, batches and responses; default: $XDG_DATA_HOME/headrace."
    )
    data_limit: int = option(
        10 * GIB, "Uploads are refused when all that is kept would take more.", size=True
    )
    max_stored_responses: int = option(
        10_000, "Of /v1/responses, so many of the newest are kept for 30 days; 0: none."
    )
    max_file_bytes: int = option(512 * MIB, "Larger uploads are answered 413.", size=True)
    batch_concurrency: int | None = option(
        None, "Lines of batches that run at the same time; default: half of --max-num-seqs."
    )
    strict_fields: bool = option(False, "Refuse unknown request fields instead of naming them.")
    trust_request_chat_template: bool = option(
        False, "Take a chat_template with a request; only where all clients are trusted."
    )
    tool_call_parser: Literal[
        "auto", "none", "hermes", "llama3_json", "mistral", "pythonic", "granite", "generic"
    ] = option("auto", "How the model writes tool calls; auto asks its chat template.")
    reasoning_parser: Literal["auto", "none", "think", "mistral", "seed_oss"] = option(
        "auto", "How the model marks what it thinks; auto asks its chat template."
    )
    cors_origin: tuple[str, ...] = option((), "Origins that browsers may call from.")
    shutdown_timeout: float = option(30.0, "Seconds that streams get to finish after SIGTERM.")
    step_timeout: float = option(
        300.0, "Seconds after which an engine that ends no step is killed and restarted."
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Log threshold.")
    log_format: Literal["text", "json"] = option("text", "Log lines for people or for machines.")


GROUPS: tuple[tuple[str, type], ...] = (
    ("Model", ModelOptions),
    ("KV cache", CacheOptions),
    ("Scheduler", SchedulerOptions),
    ("Device", DeviceOptions),
    ("Server", ServerOptions),
)


# --- reading options --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option as command line, environment and YAML see it."""

    name: str
    group: type
    default: Any
    help: str
    parse: Callable[[str], Any]
    is_flag: bool
    is_list: bool
    choices: tuple[str, ...] | None
    secret: bool


def option_specs() -> Iterator[OptionSpec]:
    """Every option of every group; names are unique across groups."""
    for _, group in GROUPS:
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            kind = hints[item.name]
            if isinstance(kind, types.UnionType):
                kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
            choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
            is_list = typing.get_origin(kind) is tuple
            is_size = bool(item.metadata.get("size"))
            scalar = str if choices or is_list else kind
            yield OptionSpec(
                name=item.name,
                group=group,
                default=item.default,
                help=item.metadata["help"],
                parse=parse_size if is_size else _parse_flag if kind is bool else scalar,
                is_flag=kind is bool,
                is_list=is_list,
                choices=choices,
                secret=bool(item.metadata.get("secret")),
            )


def parse_size(text: str) -> int:
    """Bytes from "2GiB", "512M", "1e9" or a plain number. Raises ValueError."""
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    number = str(text).strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:].isalpha() else ""
    with contextlib.suppress(KeyError, ValueError):
        size = float(number.removesuffix(unit)) * units[unit]
        if 0 <= size < 2**63:
            return int(size)
    raise ValueError(f"{text!r} is not a size such as 2GiB or 512MiB")


def _parse_flag(text: str) -> bool:
    value = str(text).strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is not true or false")


def load_options(
    model: str,
    flags: Mapping[str, Any],
    file: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[EngineConfig, ServerOptions, dict[str, str]]:
    """Merge flags over environment (HEADRACE_NAME) over file over defaults.

    Returns both configurations and where each value that is not a default came from. Raises
    ConfigError for an unknown key (with the nearest known one) or a value of the wrong kind.
    """
    specs = {spec.name: spec for spec in option_specs()}
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    file = dict(file or {})
    model = model or str(file.pop("model", ""))
    for key, value in file.items():
        name = key.replace("-", "_")
        if name not in specs:
            raise ConfigError(
                f"Unknown key {key!r} in the configuration file{nearest_hint(name, specs)}"
            )
        values[name] = _coerce(specs[name], value, f"key {key!r}")
        sources[name] = "file"
    environment = os.environ if environment is None else environment
    for name, spec in specs.items():
        variable = f"HEADRACE_{name.upper()}"
        if variable in environment:
            values[name] = _coerce(spec, environment[variable], variable)
            sources[name] = "environment"
    for name, value in flags.items():
        if name not in specs:
            raise ConfigError(f"There is no option {name!r}{nearest_hint(name, specs)}")
        values[name] = value
        sources[name] = "flag"
    groups = {
        group: group(**{n: v for n, v in values.items() if specs[n].group is group})
        for _, group in GROUPS
    }
    engine = EngineConfig(
        model=model,
        model_options=groups[ModelOptions],
        cache=groups[CacheOptions],
        scheduler=groups[SchedulerOptions],
        device=groups[DeviceOptions],
    )
    return engine, groups[ServerOptions], sources


def engine_environment() -> dict[str, str]:
    """The environment of the engine process: this one's, with OpenMP workers that soon sleep.

    By default libgomp's workers spin for milliseconds at the end of each parallel region. When
    another process wants the core (an API process does, for every token) the region waits for a
    thread that is not running, and a step takes many times as long. See docs/decisions/0003.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return dict(os.environ)
    return {"GOMP_SPINCOUNT": "1000", **os.environ}


def api_process_environment(metrics_folder: Path) -> dict[str, str]:
    """The environment of one of several API processes: prometheus_client, which looks nowhere else,
    keeps its values in files in this folder."""
    return {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder)}


def default_data_dir() -> Path:
    """https://specifications.freedesktop.org/basedir-spec"""
    home = os.environ.get("XDG_DATA_HOME", "")
    # The specification has relative paths ignored.
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "share"
    return base / "headrace"


def openai_api_key(environment: Mapping[str, str] | None = None) -> str | None:
    """The key that OpenAI's own clients would send."""
    environment = os.environ if environment is None else environment
    return environment.get("OPENAI_API_KEY") or None


def door_api_key(environment: Mapping[str, str] | None = None) -> str | None:
    """The door's `api_key` for those who keep secrets out of files and command lines."""
    environment = os.environ if environment is None else environment
    return environment.get("HEADRACE_API_KEY") or None


def ray_auth_token(environment: Mapping[str, str] | None = None) -> str:
    """What Ray's dashboard asks for, from where Ray's own clients take it; empty if nowhere."""
    environment = os.environ if environment is None else environment
    if token := environment.get("RAY_AUTH_TOKEN"):
        return token
    file = environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: it offers the closest one, if one is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _coerce(spec: OptionSpec, value: Any, where: str) -> Any:
    try:
        if spec.is_list:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(item) for item in items)
        parsed = None if value is None else spec.parse(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}.") from None
    if spec.choices and parsed not in spec.choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(spec.choices)}.")
    return parsed
