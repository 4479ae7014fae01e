"""From a configuration to a running engine: resolve, load, and wire the parts together."""

from __future__ import annotations

import contextlib
import logging
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from headrace.config import GIB, EngineConfig
from headrace.engine.block_pool import BlockPool
from headrace.engine.client import ModelInfo, PoolingInfo, Task
from headrace.engine.cpu_runner import CpuRunner
from headrace.engine.cuda_device import CudaDevice, TorchCudaDevice
from headrace.engine.cuda_memory import measured_budget
from headrace.engine.cuda_runner import CudaRunner
from headrace.engine.encoder_engine import EncoderEngine
from headrace.engine.encoder_runner import EncoderRunner
from headrace.engine.engine import AnyEngine, Engine, Runner
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.plan import Plan, make_plan
from headrace.engine.request import RunningRequests
from headrace.engine.resolution import Hardware, ResolvedConfig, with_measured_memory
from headrace.engine.scheduler import Scheduler
from headrace.errors import ConfigError
from headrace.layers.matrix import Matrix
from headrace.layers.weights import WeightTensor
from headrace.models.base import CausalLM, build_model
from headrace.models.config import ModelConfig
from headrace.models.encoder_config import EncoderConfig
from headrace.models.encoders import build_encoder
from headrace.quantization.gguf_blocks import GGUFBlocks
from headrace.quantization.load_time import LoadTimeForm
from headrace.quantization.method import QuantMethod
from headrace.quantization.stored_form import StoredForm
from headrace_kernels import dispatch, native
from headrace_kernels.kernel_set import KernelSet

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(bytes of weights read, bytes in all)"""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
HASH_KEY_BYTES = 64  # blake2b's longest key


def build_engine(config: EngineConfig, progress: Progress = lambda read, total: None) -> AnyEngine:
    """Load the model at `config.model`, a local path, and make an engine that is ready to step.

    Raises CheckpointError or ConfigError, with a remedy, before weights are read where possible.
    """
    start = time.monotonic()
    plan = make_plan(config)
    resolved = plan.resolved
    _set_up_cpu(resolved, plan.hardware)
    kernels = _choose_kernels(resolved, plan.model)
    if isinstance(plan.model, EncoderConfig):
        # Attention of one request is too little for several threads of torch's.
        if dict(kernels.names)["linear"] != "cpu":
            torch.set_num_threads(resolved.threads)
        return _encoder_engine(plan, plan.model, kernels, _with_progress(plan, progress), start)
    model = _load_model(plan, kernels, progress)
    if not _leaves_little_to_torch(model, kernels):
        torch.set_num_threads(resolved.threads)
    device = None
    if resolved.device != "cpu":
        device = TorchCudaDevice(torch.device(resolved.device))
        resolved = _measured(config, resolved, model, device)
    try:
        engine = _assemble(resolved, model, device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"A KV cache of {resolved.kv_cache_bytes / GIB:.1f} GiB does not fit on "
            f"{resolved.device}, though so much was free before. Free memory that others took "
            "meanwhile, or give a smaller --kv-cache-memory-bytes."
        ) from None
    seconds = time.monotonic() - start
    engine.info = replace(engine.info, load_seconds=seconds, pooling=_pooling_info(plan))
    return engine


def _measured(
    config: EngineConfig, resolved: ResolvedConfig, model: CausalLM, device: CudaDevice
) -> ResolvedConfig:
    """With the KV cache that fits beside what the largest step takes."""
    assert resolved.memory is not None, "a GPU's is planned"
    running = _running(resolved, model)
    memory = measured_budget(
        resolved.memory,
        lambda running, num_blocks: cuda_runner(resolved, model, running, device, num_blocks),
        device,
        running,
        resolved.max_num_batched_tokens,
    )
    return with_measured_memory(resolved, config, memory)


def _running(resolved: ResolvedConfig, model: CausalLM) -> RunningRequests:
    return RunningRequests(
        resolved.max_num_seqs,
        resolved.max_model_len,
        resolved.block_size,
        model.config.eos_token_ids,
    )


def _encoder_engine(
    plan: Plan,
    config: EncoderConfig,
    kernels: KernelSet,
    weights: Iterable[WeightTensor],
    start: float,
) -> EncoderEngine:
    resolved, device = plan.resolved, torch.device(plan.resolved.device)
    model = build_encoder(
        config,
        dtype=DTYPES[resolved.dtype],
        device=device,
        kernels=kernels,
        max_positions=resolved.max_model_len,
    )
    model.load_weights(weights)
    tasks = [Task.EMBED, Task.SCORE]
    if config.is_classifier:
        tasks = [Task.CLASSIFY, Task.SCORE] if len(config.labels) == 1 else [Task.CLASSIFY]
    info = ModelInfo(
        max_model_len=resolved.max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=[],
        num_blocks=0,
        block_size=resolved.block_size,
        max_num_seqs=resolved.max_num_seqs,
        dtype=resolved.dtype,
        device=resolved.device,
        weight_bytes=_nbytes(model),
        kv_cache_bytes=0,
        load_seconds=time.monotonic() - start,
        kernels=dict(kernels.names),
        threads=resolved.threads,
        cpu_isa=resolved.cpu_isa,
        tasks=tasks,
        pooling=_pooling_info(plan),
    )
    runner = EncoderRunner(model.eval())
    return EncoderEngine(runner, info, max_batched_tokens=resolved.max_num_batched_tokens)


def _nbytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _pooling_info(plan: Plan) -> PoolingInfo:
    model, pooling = plan.model, plan.pooling
    info = PoolingInfo(
        pooling=pooling.pooling,
        normalize=pooling.normalize,
        dimensions=model.hidden_size,
        matryoshka=pooling.matryoshka,
    )
    if isinstance(model, EncoderConfig):
        labels, activation = list(model.labels), model.score_activation
        info = replace(info, labels=labels, score_activation=activation)
        if model.is_classifier:
            info = replace(info, pooling=model.classifier_pooling)
    return info


def _assemble(resolved: ResolvedConfig, model: CausalLM, device: CudaDevice | None) -> Engine:
    """The engine around a loaded model; `device` is the GPU that it is on, if it is."""
    running = _running(resolved, model)
    key = resolved.prefix_cache_key.encode()[:HASH_KEY_BYTES]
    kv_cache = KVCacheManager(
        BlockPool(resolved.num_blocks),
        running,
        block_size=resolved.block_size,
        key=key or secrets.token_bytes(HASH_KEY_BYTES),
        kv_dtype=resolved.kv_cache_dtype,
        enable_prefix_caching=resolved.enable_prefix_caching,
    )
    scheduler = Scheduler(
        running,
        kv_cache,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        eos_token_ids=model.config.eos_token_ids,
    )
    runner: Runner
    if device is None:
        runner = CpuRunner(
            model,
            running,
            num_blocks=resolved.num_blocks,
            block_size=resolved.block_size,
            kv_dtype=DTYPES[resolved.kv_cache_dtype],
            pad_to=_row_multiple(model),
        )
    else:
        runner = cuda_runner(resolved, model, running, device, resolved.num_blocks)
        runner.idle()  # captures the largest graph, whose memory the others share
        if stems := uncapturable(model):
            logger.warning(
                "Steps run op by op, without CUDA graphs: the references of %s cannot be captured.",
                ", ".join(stems),
            )
    info = ModelInfo(
        max_model_len=resolved.max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=sorted(model.config.eos_token_ids),
        num_blocks=resolved.num_blocks,
        block_size=resolved.block_size,
        max_num_seqs=resolved.max_num_seqs,
        dtype=resolved.dtype,
        device=resolved.device,
        weight_bytes=_nbytes(model),
        kv_cache_bytes=resolved.kv_cache_bytes,
        load_seconds=0.0,
        kernels=dict(model.context.kernels.names),
        threads=resolved.threads,
        cpu_isa=resolved.cpu_isa,
        tasks=[Task.GENERATE, Task.EMBED, Task.SCORE],
    )
    return Engine(scheduler, runner, info)


def cuda_runner(
    resolved: ResolvedConfig,
    model: CausalLM,
    running: RunningRequests,
    device: CudaDevice,
    num_blocks: int,
) -> CudaRunner:
    """The runner of a model that is loaded on a GPU."""
    return CudaRunner(
        model,
        running,
        device,
        num_blocks=num_blocks,
        block_size=resolved.block_size,
        kv_dtype=DTYPES[resolved.kv_cache_dtype],
        pad_to=_row_multiple(model),
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        graphs=not uncapturable(model),
    )


def uncapturable(model: CausalLM) -> list[str]:
    """Stems of the forward pass that are left to references, which may ask the host for sizes."""
    chosen = dict(model.context.kernels.names)
    stems = {"norm", "rope", "activation", "attention", "embedding"}
    stems |= {stem for part in model.modules() if isinstance(part, Matrix) for stem in part.stems}
    if "scaled_linear" in stems:
        stems.add("quantization")
    return sorted(stem for stem in stems if chosen[stem] == "reference")


def _row_multiple(model: CausalLM) -> int:
    return max(part.row_multiple for part in model.modules() if isinstance(part, Matrix))


def _set_up_cpu(resolved: ResolvedConfig, hardware: Hardware) -> None:
    if resolved.threads > hardware.cores:
        logger.warning(
            "--threads %d: this process may use only %d cores, so its threads wait for each other. "
            "Leave the option out, or raise the affinity or the CPU quota.",
            resolved.threads,
            hardware.cores,
        )
    # Its workers spin for milliseconds behind each op, and read weights no faster than one thread.
    torch.set_num_threads(1)
    native.set_num_threads(resolved.threads)
    if resolved.cpu_isa != "none" and native.unavailable() is None:
        native.set_cpu_isa(resolved.cpu_isa)


def _leaves_little_to_torch(model: CausalLM, kernels: KernelSet) -> bool:
    """Whether attention and all large products are our own, on our own threads."""
    chosen = dict(kernels.names)
    stems = {stem for part in model.modules() if isinstance(part, Matrix) for stem in part.stems}
    return all(chosen[stem] == "cpu" for stem in {"attention", *stems})


def _choose_kernels(resolved: ResolvedConfig, model: ModelConfig | EncoderConfig) -> KernelSet:
    facts, explicit = kernel_facts(resolved, model), explicit_kernels(resolved.kernel)
    try:
        return dispatch.choose(facts, explicit)
    except dispatch.KernelUnavailableError as error:
        option = "--kernel: " if explicit else ""
        raise ConfigError(f"{option}{error}{_page_size_hint(facts, explicit)}") from None


def _page_size_hint(facts: dispatch.KernelFacts, explicit: Mapping[str, str]) -> str:
    """The nearest page size that has kernels, if there is one."""
    for size in sorted((16, 32, 64), key=lambda size: abs(size - facts.page_size)):
        with contextlib.suppress(dispatch.KernelUnavailableError):
            dispatch.choose(replace(facts, page_size=size), explicit)
            return f" --block-size {size} works."
    return ""


def explicit_kernels(choices: Sequence[str]) -> dict[str, str]:
    """{"attention": "reference"} from ("attention=reference",). Raises ConfigError."""
    explicit = {}
    for choice in choices:
        stem, equals, name = choice.partition("=")
        if not equals:
            raise ConfigError(f"--kernel {choice}: write it as STEM=NAME.")
        explicit[stem] = name
    return explicit


def kernel_facts(
    resolved: ResolvedConfig, model: ModelConfig | EncoderConfig
) -> dispatch.KernelFacts:
    """What the candidates of each op are asked with."""
    device = torch.device(resolved.device)
    arch = platform.machine()
    if device.type == "cuda":
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return dispatch.KernelFacts(
        device=device.type,
        arch=arch,
        dtype=DTYPES[resolved.dtype],
        head_dim=model.head_dim,
        page_size=resolved.block_size,
        deterministic=resolved.deterministic,
    )


def _load_model(plan: Plan, kernels: KernelSet, progress: Progress) -> CausalLM:
    assert isinstance(plan.model, ModelConfig)
    model = build_model(
        plan.model,
        dtype=DTYPES[plan.resolved.dtype],
        device=torch.device(plan.resolved.device),
        kernels=kernels,
        max_positions=plan.resolved.max_model_len,
        activation_bits=16 if plan.resolved.weights == "exact" else 8,
    )
    method = _quant_method(plan, kernels)
    if plan.model.quantization is not None and method is None:
        why = plan.resolved.why["weights"] or "the kernels for them do not load"
        logger.info("The weights (%s) become dense: %s.", plan.model.quantization.label, why)
    model.load_weights(_with_progress(plan, progress), method)
    return model.eval()


def _quant_method(plan: Plan, kernels: KernelSet) -> QuantMethod | None:
    """What keeps weights in 4 or 8 bits; None if all are to be dense."""
    resolved = plan.resolved
    scaled, exact = resolved.weights == "scaled", resolved.weights == "exact"
    stem = "scaled_linear" if scaled else "quantized_linear"
    is_asked_for = stem in explicit_kernels(resolved.kernel) or resolved.quantization != "auto"
    # A kernel's file may be there, but not load; the reference is no faster than dense weights.
    if resolved.weights == "dense" or (
        dict(kernels.names)[stem] == "reference" and not is_asked_for
    ):
        return None
    if resolved.quantization != "auto":
        return LoadTimeForm(resolved.quantization, packed=not scaled)
    if plan.model.quantization is not None:
        return StoredForm(scaled=scaled, exact_scales=exact)
    return GGUFBlocks(exact_scales=exact)


def _with_progress(plan: Plan, progress: Progress) -> Iterator[WeightTensor]:
    """The checkpoint's weights; reports the bytes of each once its reader asks for the next."""
    total, done = plan.checkpoint.weight_bytes, 0
    for tensor in plan.weights():
        yield tensor
        done += tensor.nbytes
        progress(done, total)
    progress(total, total)
