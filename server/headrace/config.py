"""Every option, its default, and how the open ones are resolved for a model and a machine.

`resolve` is pure. This is the only file that reads the environment.
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
    max_model_len: int | None = option(
        None, "Tokens of prompt plus output a request may have; default: what the model allows."
    )
    chat_template: str | None = option(None, "A Jinja file that replaces the model's template.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    kv_cache_memory_bytes: int | None = option(
        None, "Memory for the KV cache, such as 2GiB; default: a share of what is free.", size=True
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
    served_model_name: tuple[str, ...] = option(
        (), "Name of the model in the API; more than one are aliases."
    )
    api_key: str | None = option(None, "Clients must send it as a Bearer token.", secret=True)
    max_queued_requests: int = option(1024, "Requests that may wait; more are answered 429.")
    max_queued_tokens: int = option(4_000_000, "Prompt tokens that may wait.")
    max_body_bytes: int = option(32 * MIB, "Larger request bodies are answered 413.", size=True)
    strict_fields: bool = option(False, "Refuse unknown request fields instead of naming them.")
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


# --- resolution -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What `resolve` may know of the machine."""

    device: str
    """cpu or cuda:N"""
    name: str
    cores: int
    """That this process may use (affinity and cgroup limits)."""
    memory_bytes: int
    """Free on the device now (host memory for a CPU), within cgroup limits."""
    has_bf16: bool
    """bf16 dot products in hardware."""
    has_native: bool = False
    """The C++ kernels for it are built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What `resolve` may know of the model, without its weights."""

    name: str
    architecture: str
    num_parameters: int
    max_position_embeddings: int
    kv_elements_per_token: int
    """2 * layers * K * D"""
    checkpoint_dtype: str
    """float32, bfloat16, float16, or a quantization name."""
    vocab_size: int
    packed_parameters: int = 0
    """Of num_parameters, those that quantized kernels take as they are stored."""
    packed_bytes: int = 0
    """What those take then."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A value and where it came from."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Concrete values for one model on one machine; `why` explains each."""

    device: str
    threads: int
    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    packs_weights: bool
    """Quantized weights are kept as integers, not dequantized."""
    weight_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    enable_prefix_caching: bool
    prefix_cache_key: str
    kernel: tuple[str, ...]
    why: Mapping[str, str]

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def full_context_concurrency(self) -> float:
        """Requests of max_model_len tokens that the KV cache holds at once."""
        return self.kv_capacity_tokens / self.max_model_len


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_SHARE, GPU_KV_SHARE = 0.25, 0.90
CPU_KV_LIMIT = 4 * GIB


def resolve(config: EngineConfig, hardware: Hardware, model: ModelFacts) -> ResolvedConfig:
    """Choose every open value. Pure. Raises ConfigError, with a remedy, if the model cannot run."""
    on_cpu, default = hardware.device == "cpu", f"default on {hardware.device}"
    pick = _Picker()
    threads = pick("threads", config.device.threads, hardware.cores, "cores this process may use")
    block_size = pick("block_size", config.cache.block_size, 16 if on_cpu else 64, default)
    seqs = 64 if on_cpu else 256
    max_num_seqs = pick("max_num_seqs", config.scheduler.max_num_seqs, seqs, default)
    budget = pick(
        "max_num_batched_tokens",
        config.scheduler.max_num_batched_tokens,
        max(256 if on_cpu else 8192, max_num_seqs),
        default,
    )
    if budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({max_num_seqs}): "
            "every running request needs one token a step. Raise it or lower max_num_seqs."
        )
    dtype, pick.why["dtype"] = _resolve_dtype(config.model_options.dtype, hardware, model)
    packs, weight_bytes = _weights(pick, config, dtype, hardware, model)
    kv_bytes_per_token = model.kv_elements_per_token * DTYPE_BYTES[dtype]
    limit = model.max_position_embeddings
    max_model_len = pick(
        "max_model_len", config.model_options.max_model_len, limit, "the model's own limit"
    )
    if not 1 < max_model_len <= limit:
        raise ConfigError(
            f"max_model_len must be in [2, {limit}] for {model.name}, got {max_model_len}."
        )
    useful = max_num_seqs * max_model_len * kv_bytes_per_token
    kv_bytes = pick(
        "kv_cache_bytes",
        config.cache.kv_cache_memory_bytes,
        *_automatic_kv_bytes(hardware.memory_bytes - weight_bytes, useful, on_cpu=on_cpu),
    )
    num_blocks = kv_bytes // (kv_bytes_per_token * block_size)
    pick.why["num_blocks"] = "kv_cache_bytes / bytes of a block"
    if num_blocks * block_size < max_model_len:
        if config.model_options.max_model_len is not None or num_blocks < 2:
            raise _too_small(kv_bytes, num_blocks * block_size, max_model_len, kv_bytes_per_token)
        max_model_len = num_blocks * block_size
        pick.why["max_model_len"] = "what the KV cache holds"
    return ResolvedConfig(
        device=hardware.device,
        threads=threads,
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        packs_weights=packs,
        weight_bytes=weight_bytes,
        kv_cache_bytes=num_blocks * block_size * kv_bytes_per_token,
        kv_bytes_per_token=kv_bytes_per_token,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        prefix_cache_key=config.cache.prefix_cache_key,
        kernel=config.device.kernel,
        why=pick.why,
    )


class _Picker:
    """Takes what was given, or else the default, and remembers why."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}

    def __call__(self, name: str, given: int | None, default: int, reason: str) -> int:
        self.why[name] = reason if given is None else "given"
        value = default if given is None else given
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
        return value


def _weights(
    pick: _Picker, config: EngineConfig, dtype: str, hardware: Hardware, model: ModelFacts
) -> tuple[bool, int]:
    """Whether quantized weights are kept as they are, and the bytes of all weights."""
    packs = config.model_options.dtype == "auto" and model.packed_parameters > 0
    packs = packs and hardware.device == "cpu" and hardware.has_native
    weight_bytes = model.num_parameters * DTYPE_BYTES[dtype]
    pick.why["weight_bytes"] = f"parameters in {dtype}"
    if packs:
        weight_bytes += model.packed_bytes - model.packed_parameters * DTYPE_BYTES[dtype]
        pick.why["weight_bytes"] = f"quantized weights as they are, other parameters in {dtype}"
    if weight_bytes < hardware.memory_bytes:
        return packs, weight_bytes
    raise ConfigError(
        f"The weights of {model.name} take {weight_bytes / GIB:.1f} GiB in {dtype}, and "
        f"{hardware.memory_bytes / GIB:.1f} GiB are free on {hardware.device}. "
        "Free memory, choose a smaller model, or a smaller --dtype."
    )


def _automatic_kv_bytes(free: int, useful: int, *, on_cpu: bool) -> tuple[int, str]:
    share, limit = (CPU_KV_SHARE, CPU_KV_LIMIT) if on_cpu else (GPU_KV_SHARE, useful)
    reason = f"{share:.0%} of free memory, at most what max_num_seqs full requests need"
    if on_cpu:
        reason += f" and {CPU_KV_LIMIT // GIB} GiB"
    return max(1, min(int(free * share), useful, limit)), reason


def _too_small(kv_bytes: int, capacity: int, max_model_len: int, per_token: int) -> ConfigError:
    needed = -(-max_model_len * per_token // MIB)
    return ConfigError(
        f"The KV cache of {kv_bytes / MIB:.0f} MiB holds {capacity} tokens, fewer than "
        f"max_model_len ({max_model_len}). Give --kv-cache-memory-bytes {needed}MiB or a smaller "
        "--max-model-len."
    )


def _resolve_dtype(chosen: str, hardware: Hardware, model: ModelFacts) -> tuple[str, str]:
    if chosen != "auto":
        return chosen, "given"
    if hardware.device == "cpu":
        if hardware.has_bf16:
            return "bfloat16", "the CPU has bf16 dot products"
        return "float32", "the CPU has no bf16 dot products"
    if model.checkpoint_dtype in ("bfloat16", "float16"):
        return model.checkpoint_dtype, "the checkpoint's own"
    return "bfloat16", f"default for a {model.checkpoint_dtype} checkpoint on a GPU"
