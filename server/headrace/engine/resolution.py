"""From options, model and machine to concrete values, each with its reason. Pure, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.config import GIB, MIB, EngineConfig
from headrace.engine.memory import GRAPH_BYTES_ESTIMATE, MemoryBudget, estimated_activations
from headrace.errors import ConfigError


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
    total_bytes: int = 0
    """Memory of a GPU, used or not."""
    has_fp8: bool = False
    """A GPU converts float8_e4m3fn in hardware."""
    has_native: bool = False
    """The C++ kernels for it are built."""
    cpu_isa: str = "scalar"
    """The best level of those kernels that the CPU has."""
    product_kernels: tuple[str, ...] = ()
    """On a GPU: quantized_linear and scaled_linear, if they have a kernel besides the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What `resolve` may know of the model, without its weights."""

    name: str
    architecture: str
    num_parameters: int
    max_position_embeddings: int
    kv_elements_per_token: int
    """2 * layers * K * D"""
    kv_rows_per_token: int
    """2 * layers * K: so many scales belong to the elements of an int8 cache."""
    checkpoint_dtype: str
    """float32, bfloat16, float16, or a quantization name."""
    vocab_size: int
    activation_bytes_per_token: Mapping[str, int] = field(default_factory=dict)
    """By dtype: what the layers of a step keep of each of its tokens."""
    packed_parameters: int = 0
    """Of num_parameters, those that quantized kernels take as they are stored."""
    packed_bytes: int = 0
    """What those take then."""
    exact_bytes: int = 0
    """What they take if no scale is rounded."""
    scaled_parameters: int = 0
    """Of num_parameters, those that products with 8-bit activations take as 8-bit rows."""
    scaled_bytes: int = 0
    """What those take then, with their scales."""
    trained_length: int | None = None
    """Tokens to which texts were cut in training, where that is less than the model can take."""
    dtype_dequantizes: bool = True
    """Whether --dtype is the type of all weights: in GGUF files, which store no other type."""

    @property
    def is_encoder(self) -> bool:
        """It has no KV cache."""
        return self.kv_rows_per_token == 0


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
    cpu_isa: str
    """Of the C++ kernels; "none" where they do not run."""
    dtype: str
    kv_cache_dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    quantization: str
    """fp8 or int8 if weights are rounded as they are loaded, or auto."""
    weights: str
    """Quantized ones are kept as integers: packed, or exact, or scaled (8-bit rows); or dense."""
    weight_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    memory: MemoryBudget | None
    """Of a GPU."""
    enable_prefix_caching: bool
    prefix_cache_key: str
    deterministic: bool
    kernel: tuple[str, ...]
    why: Mapping[str, str]

    @property
    def kv_capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def full_context_concurrency(self) -> float:
        """Requests of max_model_len tokens that the KV cache holds at once."""
        return self.kv_capacity_tokens / self.max_model_len


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
KV_SCALE_BYTES = 4
NO_KV_CACHE = "an encoder has no KV cache"
EIGHT_BIT_KV = ("int8", "fp8")
CPU_KV_SHARE = 0.25
CPU_KV_LIMIT = 4 * GIB
CPU_ISAS = ("scalar", "avx2", "avx512")
"""Levels of the CPU kernels, each of which includes those before it."""


def resolve(config: EngineConfig, hardware: Hardware, model: ModelFacts) -> ResolvedConfig:
    """Choose every open value. Pure. Raises ConfigError, with a remedy, if the model cannot run."""
    on_cpu, default = hardware.device == "cpu", f"default on {hardware.device}"
    pick = _Picker()
    threads = pick("threads", config.device.threads, hardware.cores, "cores this process may use")
    pick.why["threads"] += _too_many_threads(threads, hardware.cores)
    cpu_isa, pick.why["cpu_isa"] = _resolve_cpu_isa(config.device.cpu_isa, hardware)
    block_size = pick("block_size", config.cache.block_size, 16 if on_cpu else 64, default)
    given = config.scheduler
    max_num_seqs = pick("max_num_seqs", given.max_num_seqs, 64 if on_cpu else 256, default)
    tokens = max(256 if on_cpu else 8192, max_num_seqs)
    budget = pick("max_num_batched_tokens", given.max_num_batched_tokens, tokens, default)
    if budget < max_num_seqs:
        raise _budget_too_small(budget, max_num_seqs)
    dtype, pick.why["dtype"] = _resolve_dtype(config, hardware, model)
    weights, weight_bytes = _weights(pick, config, dtype, hardware, model)
    kv_cache_dtype, kv_bytes_per_token = _kv_cache_type(pick, config, dtype, hardware, model)
    limit = model.max_position_embeddings
    reason = "the model's own limit" if model.trained_length is None else "modules.json"
    max_model_len = pick(
        "max_model_len",
        config.model_options.max_model_len,
        min(limit, model.trained_length or limit),
        reason,
    )
    if not 1 < max_model_len <= limit:
        raise ConfigError(
            f"max_model_len must be in [2, {limit}] for {model.name}, got {max_model_len}."
        )
    memory = (
        None if on_cpu else _estimate(hardware, model, dtype, weight_bytes, budget, max_num_seqs)
    )
    resolved = ResolvedConfig(
        device=hardware.device,
        threads=threads,
        cpu_isa=cpu_isa,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        num_blocks=0,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        quantization=config.model_options.quantization,
        weights=weights,
        weight_bytes=weight_bytes,
        kv_cache_bytes=0,
        kv_bytes_per_token=kv_bytes_per_token,
        memory=memory,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        prefix_cache_key=config.cache.prefix_cache_key,
        deterministic=config.device.deterministic,
        kernel=config.device.kernel,
        why=pick.why,
    )
    return _with_kv_cache(resolved, config, hardware.memory_bytes - weight_bytes)


def with_measured_memory(
    resolved: ResolvedConfig, config: EngineConfig, memory: MemoryBudget
) -> ResolvedConfig:
    """The KV cache made as large as `memory` leaves room for. Pure. Raises ConfigError, with a
    remedy, if that is too little."""
    return _with_kv_cache(replace(resolved, memory=memory), config, memory.free)


def _with_kv_cache(resolved: ResolvedConfig, config: EngineConfig, free: int) -> ResolvedConfig:
    """Choose the size of the KV cache, and a context that fits into it."""
    why, per_token = dict(resolved.why), resolved.kv_bytes_per_token
    if per_token == 0:
        why |= dict.fromkeys(("kv_cache_bytes", "num_blocks"), NO_KV_CACHE)
        return replace(resolved, why=why)
    given, block_size = config.cache.kv_cache_memory_bytes, resolved.block_size
    if given is None:
        useful = resolved.max_num_seqs * resolved.max_model_len * per_token
        kv_bytes, why["kv_cache_bytes"] = _automatic_kv_bytes(free, useful, resolved.memory)
    elif given < 1:
        raise ConfigError(f"kv_cache_memory_bytes must be at least 1, got {given}.")
    elif resolved.memory is not None and given > max(free, 0):
        raise ConfigError(
            f"kv_cache_memory_bytes: {given / GIB:.1f} GiB do not fit beside weights, activations "
            f"and graphs on {resolved.device}: {max(free, 0) / GIB:.1f} GiB are free then. Give "
            "less, or leave --kv-cache-memory-bytes out."
        )
    else:
        kv_bytes, why["kv_cache_bytes"] = given, "given"
    num_blocks = kv_bytes // (per_token * block_size)
    why["num_blocks"] = "kv_cache_bytes / bytes of a block"
    max_model_len = resolved.max_model_len
    if num_blocks * block_size < max_model_len:
        if config.model_options.max_model_len is not None or num_blocks < 2:
            raise _too_small(resolved, kv_bytes, num_blocks, is_given=given is not None)
        max_model_len = num_blocks * block_size
        why["max_model_len"] = "what the KV cache holds"
    return replace(
        resolved,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        kv_cache_bytes=num_blocks * block_size * per_token,
        why=why,
    )


def _estimate(
    hardware: Hardware,
    model: ModelFacts,
    dtype: str,
    weight_bytes: int,
    max_tokens: int,
    max_num_seqs: int,
) -> MemoryBudget:
    total = max(hardware.total_bytes, hardware.memory_bytes)
    return MemoryBudget(
        total=total,
        others=total - hardware.memory_bytes,
        weights=weight_bytes,
        activations=estimated_activations(
            max_tokens=max_tokens,
            bytes_per_token=model.activation_bytes_per_token.get(dtype, 0),
            max_num_seqs=max_num_seqs,
            vocab_size=model.vocab_size,
        ),
        graphs=GRAPH_BYTES_ESTIMATE,
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
) -> tuple[str, int]:
    """What becomes of quantized weights, and the bytes of all weights."""
    weights, pick.why["weights"] = _weight_form(config, hardware, model)
    kept, kept_bytes = {
        "packed": (model.packed_parameters, model.packed_bytes),
        "exact": (model.packed_parameters, model.exact_bytes),
        "scaled": (model.scaled_parameters, model.scaled_bytes),
        "dense": (0, 0),
    }[weights]
    weight_bytes = (model.num_parameters - kept) * DTYPE_BYTES[dtype] + kept_bytes
    pick.why["weight_bytes"] = f"parameters in {dtype}"
    if not kept and (model.packed_parameters or model.scaled_parameters):
        pick.why["weight_bytes"] = f"dequantized to {dtype}: {pick.why['weights']}"
    if kept:
        rounded = config.model_options.quantization
        what = "quantized weights as they are" if rounded == "auto" else f"layers in {rounded}"
        pick.why["weight_bytes"] = f"{what}, other parameters in {dtype}"
    if weight_bytes < hardware.memory_bytes:
        return weights, weight_bytes
    raise ConfigError(
        f"The weights of {model.name} take {weight_bytes / GIB:.1f} GiB in {dtype}, and "
        f"{hardware.memory_bytes / GIB:.1f} GiB are free on {hardware.device}. "
        "Free memory, choose a smaller model, a smaller --dtype, or --quantization fp8 or int8."
    )


def _weight_form(config: EngineConfig, hardware: Hardware, model: ModelFacts) -> tuple[str, str]:
    """`weights` of a ResolvedConfig and, if they become dense, why."""
    options = config.model_options
    why = f"no kernels for products with them run on {hardware.device}"
    if options.weights == "dense":
        why = "--weights dense"
    elif not (model.packed_parameters or model.scaled_parameters):
        why = "the checkpoint has none in a packed format"
    elif options.weights == "exact" and not model.packed_parameters:
        why = "--weights exact: products with them round their inputs"
    elif options.dtype != "auto" and model.dtype_dequantizes and options.quantization == "auto":
        why = "--dtype asks for dense weights"
    elif (
        model.scaled_parameters
        and options.weights != "exact"
        and _has_kernel("scaled_linear", config, hardware)
    ):
        return "scaled", ""
    elif model.packed_parameters and _has_kernel("quantized_linear", config, hardware):
        return options.weights, ""
    if options.quantization == "auto":
        return "dense", why
    instead = "Leave it out" if options.quantization == "int8" else "Use int8, or leave it out"
    raise ConfigError(
        f"--quantization {options.quantization}: {why}. {instead}, or ask for the reference, which "
        "is slow, with --kernel scaled_linear=reference."
    )


def _has_kernel(stem: str, config: EngineConfig, hardware: Hardware) -> bool:
    """Whether products are faster with quantized weights than with dense ones, or asked for."""
    if any(choice.startswith(f"{stem}=") for choice in config.device.kernel):
        return True
    if hardware.device == "cpu":
        return stem == "quantized_linear" and hardware.has_native
    return stem in hardware.product_kernels


def _kv_cache_type(
    pick: _Picker, config: EngineConfig, dtype: str, hardware: Hardware, model: ModelFacts
) -> tuple[str, int]:
    """The type of the KV cache, and the bytes that a token takes in it."""
    given = config.cache.kv_cache_dtype
    if model.is_encoder:
        pick.why["kv_cache_dtype"] = NO_KV_CACHE
        return dtype, 0
    chosen = dtype if given == "auto" else given
    pick.why["kv_cache_dtype"] = "that of dtype" if given == "auto" else "given"
    if reason := _why_not_kv_type(chosen, dtype, hardware, model):
        raise ConfigError(f"kv_cache_dtype {chosen}: {reason}")
    scales = KV_SCALE_BYTES * model.kv_rows_per_token if chosen in EIGHT_BIT_KV else 0
    return chosen, model.kv_elements_per_token * DTYPE_BYTES[chosen] + scales


def _why_not_kv_type(chosen: str, dtype: str, hardware: Hardware, model: ModelFacts) -> str:
    """With a remedy; empty if it can be."""
    head_dim = model.kv_elements_per_token // model.kv_rows_per_token
    if chosen in EIGHT_BIT_KV and head_dim % KV_SCALE_BYTES:
        return (
            f"8-bit caches take heads of multiples of {KV_SCALE_BYTES}, and those of {model.name} "
            f"have {head_dim}. Leave --kv-cache-dtype at auto."
        )
    if hardware.device == "cpu":
        if chosen == "fp8":
            return "no kernel for it runs on a CPU. int8 takes half of what bfloat16 does."
    elif chosen == "fp8" and not hardware.has_fp8:
        return f"{hardware.name} has no float8 conversions. int8 takes as much."
    elif chosen not in EIGHT_BIT_KV and chosen != dtype:
        return f"on {hardware.device} floats are cached like dtype, {dtype}: use auto, int8 or fp8."
    return ""


def _automatic_kv_bytes(free: int, useful: int, memory: MemoryBudget | None) -> tuple[int, str]:
    if memory is None:
        share, reason = CPU_KV_SHARE, f"{CPU_KV_SHARE:.0%} of free memory"
        kv_bytes = min(int(free * share), useful, CPU_KV_LIMIT)
        limit = f"what max_num_seqs full requests need and {CPU_KV_LIMIT // GIB} GiB"
        return max(1, kv_bytes), f"{reason}, at most {limit}"
    left = "what is left" if memory.is_measured else "what is left, as estimated"
    limit = "what max_num_seqs full requests need"
    return max(1, min(memory.kv_cache, useful)), f"{left}, at most {limit}"


def _too_many_threads(threads: int, cores: int) -> str:
    return f"; this process may use only {cores} cores" if threads > cores else ""


def _budget_too_small(budget: int, max_num_seqs: int) -> ConfigError:
    return ConfigError(
        f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({max_num_seqs}): "
        "every running request needs one token a step. Raise it or lower max_num_seqs."
    )


def _too_small(
    resolved: ResolvedConfig, kv_bytes: int, num_blocks: int, *, is_given: bool
) -> ConfigError:
    needed = -(-resolved.max_model_len * resolved.kv_bytes_per_token // MIB)
    remedy = f"Give --kv-cache-memory-bytes {needed}MiB or a smaller --max-model-len."
    if resolved.memory is not None and not is_given:
        remedy = (
            f"One needs {needed} MiB. Free memory, or give a smaller --max-model-len or "
            "--max-num-batched-tokens, or --kv-cache-dtype int8, or --quantization fp8 or int8."
        )
    return ConfigError(
        f"The KV cache of {kv_bytes / MIB:.0f} MiB holds {num_blocks * resolved.block_size} "
        f"tokens, fewer than max_model_len ({resolved.max_model_len}). {remedy}"
    )


def _resolve_cpu_isa(chosen: str, hardware: Hardware) -> tuple[str, str]:
    runs = hardware.device == "cpu" and hardware.has_native
    if chosen == "auto":
        if runs:
            return hardware.cpu_isa, "the best that this CPU has"
        return "none", f"no native kernels for a CPU run on {hardware.device}"
    if not runs:
        raise ConfigError(
            f"--cpu-isa {chosen}: no native kernels for a CPU run here, on {hardware.device}. "
            "Leave it out, or build them and use --device cpu."
        )
    if CPU_ISAS.index(chosen) > CPU_ISAS.index(hardware.cpu_isa):
        raise ConfigError(
            f"--cpu-isa {chosen}: this CPU ({hardware.name}) lacks some of its instructions. "
            f"Its best level is {hardware.cpu_isa}."
        )
    return chosen, "given"


def _resolve_dtype(config: EngineConfig, hardware: Hardware, model: ModelFacts) -> tuple[str, str]:
    chosen = config.model_options.dtype
    if chosen != "auto":
        return chosen, "given"
    if hardware.device == "cpu" and model.is_encoder:
        return "float32", "encoders are small"
    if hardware.device == "cpu":
        if config.device.cpu_isa in ("avx2", "scalar"):
            return "float32", f"{config.device.cpu_isa} has no bf16 dot products"
        if hardware.has_bf16:
            return "bfloat16", "the CPU has bf16 dot products"
        return "float32", "the CPU has no bf16 dot products"
    if model.checkpoint_dtype in ("bfloat16", "float16"):
        return model.checkpoint_dtype, "the checkpoint's own"
    return "bfloat16", f"default for a {model.checkpoint_dtype} checkpoint on a GPU"
