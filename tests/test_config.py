"""Options: where values come from, and what `resolve` makes of the open ones."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.config import (
    GIB,
    MIB,
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
    load_options,
    option_specs,
    parse_size,
)
from headrace.engine.resolution import Hardware, ModelFacts, resolve, with_measured_memory
from headrace.errors import ConfigError

CPU = Hardware(device="cpu", name="a CPU", cores=2, memory_bytes=16 * GIB, has_bf16=True)
GPU = Hardware(
    device="cuda:0", name="a GPU", cores=16, memory_bytes=140 * GIB, has_bf16=True, has_fp8=True
)
SMALL = ModelFacts(
    name="small",
    architecture="LlamaForCausalLM",
    num_parameters=134_515_008,
    max_position_embeddings=8192,
    kv_elements_per_token=2 * 30 * 3 * 64,
    kv_rows_per_token=2 * 30 * 3,
    checkpoint_dtype="Q4_1",
    vocab_size=49152,
)


def test_at_most_50_options_and_each_explains_itself():
    specs = list(option_specs())
    assert len(specs) <= 50
    assert len({spec.name for spec in specs}) == len(specs), "names are unique across groups"
    assert all(spec.help.endswith(".") for spec in specs)


def test_flags_go_over_environment_over_file_over_defaults():
    engine, server, sources = load_options(
        "m",
        {"port": 1},
        {"port": 3, "host": "file", "max-num-seqs": 7},
        {"HEADRACE_PORT": "2", "HEADRACE_HOST": "environment", "HEADRACE_STRICT_FIELDS": "yes"},
    )
    assert (server.port, server.host, server.strict_fields) == (1, "environment", True)
    assert engine.scheduler.max_num_seqs == 7
    assert sources["port"] == "flag"
    assert sources["host"] == "environment"
    assert sources["max_num_seqs"] == "file"


@pytest.mark.parametrize(
    ("file", "environment", "message"),
    [
        ({"max_num_seq": 1}, {}, "did you mean 'max_num_seqs'"),
        ({"nonsense": 1}, {}, "Unknown key 'nonsense' in the configuration file."),
        ({"port": "eight"}, {}, "key 'port'"),
        ({}, {"HEADRACE_PORT": "eight"}, "HEADRACE_PORT"),
        ({"dtype": "int3"}, {}, "'int3' is not one of auto, float32"),
        ({"kv_cache_dtype": "fp4"}, {}, "key 'kv_cache_dtype': 'fp4' is not one of auto, float32"),
        ({"kv_cache_memory_bytes": "2 apples"}, {}, "is not a size"),
    ],
)
def test_wrong_options_are_refused_by_name(file, environment, message):
    with pytest.raises(ConfigError, match=message):
        load_options("", {}, file, environment)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("2GiB", 2 * GIB), ("512M", 512 * MIB), ("1.5g", 3 * GIB // 2), ("1e3", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_defaults_for_a_small_model_on_a_cpu():
    resolved = resolve(EngineConfig(), CPU, SMALL)
    assert (resolved.dtype, resolved.block_size, resolved.threads) == ("bfloat16", 16, 2)
    assert resolved.max_model_len == 8192
    assert resolved.kv_bytes_per_token == 23_040
    assert resolved.weight_bytes == 2 * SMALL.num_parameters
    assert resolved.kv_cache_bytes <= 4 * GIB
    assert resolved.kv_capacity_tokens == resolved.num_blocks * 16
    assert resolved.why["dtype"] == "the CPU has bf16 dot products"


def test_an_int8_cache_holds_almost_twice_the_tokens():
    memory = {"kv_cache_memory_bytes": GIB}
    default = resolve(EngineConfig(cache=CacheOptions(**memory)), CPU, SMALL)
    int8 = EngineConfig(cache=CacheOptions(**memory, kv_cache_dtype="int8"))
    resolved = resolve(int8, CPU, SMALL)
    assert (default.kv_cache_dtype, default.why["kv_cache_dtype"]) == ("bfloat16", "that of dtype")
    assert (resolved.kv_cache_dtype, resolved.dtype) == ("int8", "bfloat16")
    assert resolved.kv_bytes_per_token == 2 * 30 * 3 * (64 + 4)
    assert resolved.kv_capacity_tokens / default.kv_capacity_tokens == pytest.approx(128 / 68, 1e-3)
    on_gpu = resolve(int8, GPU, SMALL)
    assert (on_gpu.kv_cache_dtype, on_gpu.kv_bytes_per_token) == ("int8", 2 * 30 * 3 * (64 + 4))


@pytest.mark.parametrize(
    ("dtype", "hardware", "message"),
    [
        ("fp8", CPU, "kv_cache_dtype fp8: no kernel for it runs on a CPU. int8 takes half"),
        ("fp8", dataclasses.replace(GPU, has_fp8=False), "a GPU has no float8 .* int8 takes as"),
        ("float16", GPU, "on cuda:0 floats are cached like dtype, bfloat16: use auto"),
    ],
)
def test_kv_types_that_nothing_here_computes_with(dtype, hardware, message):
    config = EngineConfig(cache=CacheOptions(kv_cache_dtype=dtype))
    with pytest.raises(ConfigError, match=message):
        resolve(config, hardware, SMALL)
    odd = dataclasses.replace(SMALL, kv_elements_per_token=2 * 30 * 3 * 66)
    eight_bits = EngineConfig(cache=CacheOptions(kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match="heads of multiples of 4, and those of small have 66"):
        resolve(eight_bits, hardware, odd)


def test_an_fp8_cache_takes_what_an_int8_cache_does():
    fp8 = EngineConfig(cache=CacheOptions(kv_cache_dtype="fp8"))
    assert resolve(fp8, GPU, SMALL).kv_bytes_per_token == 2 * 30 * 3 * (64 + 4)


def test_quantized_weights_are_kept_where_kernels_take_them():
    packed = SMALL.num_parameters // 2
    model = dataclasses.replace(SMALL, packed_parameters=packed, packed_bytes=packed // 2)
    native = dataclasses.replace(CPU, has_native=True)
    resolved = resolve(EngineConfig(), native, model)
    assert resolved.weights == "packed"
    assert resolved.weight_bytes == 2 * (SMALL.num_parameters - packed) + packed // 2
    assert resolved.why["weight_bytes"].startswith("quantized weights as they are")
    exact = EngineConfig(model_options=ModelOptions(weights="exact"))
    facts = dataclasses.replace(model, exact_bytes=packed)
    resolved = resolve(exact, native, facts)
    assert resolved.weights == "exact"
    assert resolved.weight_bytes == 2 * (SMALL.num_parameters - packed) + packed
    dequantized = EngineConfig(model_options=ModelOptions(dtype="float32", weights="exact"))
    for config, hardware, facts in (
        (dequantized, native, model),
        (EngineConfig(), CPU, model),
        (EngineConfig(), native, SMALL),
        (EngineConfig(), dataclasses.replace(GPU, has_native=True), model),
    ):
        assert resolve(config, hardware, facts).weights == "dense"


def test_without_bf16_hardware_a_cpu_computes_in_fp32():
    hardware = dataclasses.replace(CPU, has_bf16=False)
    assert resolve(EngineConfig(), hardware, SMALL).dtype == "float32"


def test_a_gpu_gets_larger_blocks_and_batches():
    resolved = resolve(EngineConfig(), GPU, SMALL)
    assert (resolved.block_size, resolved.max_num_seqs) == (64, 256)
    assert resolved.max_num_batched_tokens == 8192


def test_little_memory_shortens_the_context_unless_it_was_asked_for():
    cache = CacheOptions(kv_cache_memory_bytes=64 * MIB)
    resolved = resolve(EngineConfig(cache=cache), CPU, SMALL)
    assert resolved.max_model_len == resolved.kv_capacity_tokens < 8192
    assert resolved.why["max_model_len"] == "what the KV cache holds"
    asked = EngineConfig(cache=cache, model_options=ModelOptions(max_model_len=8192))
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes 180MiB"):
        resolve(asked, CPU, SMALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(model_options=ModelOptions(max_model_len=9000)), r"in \[2, 8192\]"),
        (EngineConfig(scheduler=SchedulerOptions(max_num_seqs=0)), "max_num_seqs must be"),
        (
            EngineConfig(scheduler=SchedulerOptions(max_num_seqs=64, max_num_batched_tokens=32)),
            "at least max_num_seqs",
        ),
        (EngineConfig(device=DeviceOptions(threads=0)), "threads must be"),
        (EngineConfig(cache=CacheOptions(block_size=0)), "block_size must be"),
    ],
)
def test_impossible_values_name_the_option(config, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config, CPU, SMALL)


def test_weights_that_do_not_fit_are_refused_before_they_are_read():
    tight = dataclasses.replace(CPU, memory_bytes=100 * MIB)
    with pytest.raises(ConfigError, match="Free memory, choose a smaller model"):
        resolve(EngineConfig(), tight, SMALL)


NATIVE = dataclasses.replace(CPU, has_native=True, cpu_isa="avx2")


def test_the_instruction_set_is_the_best_or_the_one_asked_for():
    resolved = resolve(EngineConfig(), NATIVE, SMALL)
    assert (resolved.cpu_isa, resolved.why["cpu_isa"]) == ("avx2", "the best that this CPU has")
    asked = EngineConfig(device=DeviceOptions(cpu_isa="scalar"))
    resolved = resolve(asked, NATIVE, SMALL)
    assert (resolved.cpu_isa, resolved.dtype) == ("scalar", "float32")
    assert resolve(EngineConfig(), CPU, SMALL).cpu_isa == "none"
    assert resolve(EngineConfig(), GPU, SMALL).cpu_isa == "none"


@pytest.mark.parametrize(
    ("isa", "hardware", "message"),
    [
        ("avx512", NATIVE, "--cpu-isa avx512: this CPU .a CPU. lacks .* best level is avx2"),
        ("avx2", CPU, "--cpu-isa avx2: no native kernels for a CPU run here.* build them"),
        ("scalar", GPU, "--cpu-isa scalar: no native kernels for a CPU run here, on cuda:0"),
    ],
)
def test_an_instruction_set_that_is_not_here_is_refused(isa, hardware, message):
    config = EngineConfig(device=DeviceOptions(cpu_isa=isa))
    with pytest.raises(ConfigError, match=message):
        resolve(config, hardware, SMALL)


def test_more_threads_than_cores_are_pointed_out():
    resolved = resolve(EngineConfig(device=DeviceOptions(threads=3)), CPU, SMALL)
    assert resolved.threads == 3
    assert resolved.why["threads"] == "given; this process may use only 2 cores"


LARGE = dataclasses.replace(
    SMALL,
    num_parameters=8_030_261_248,
    max_position_embeddings=131072,
    kv_elements_per_token=2 * 32 * 8 * 128,
    kv_rows_per_token=2 * 32 * 8,
    checkpoint_dtype="bfloat16",
    vocab_size=128256,
    activation_bytes_per_token={"bfloat16": 200_000},
)


def test_a_gpu_caches_what_weights_and_steps_leave():
    hardware = dataclasses.replace(GPU, total_bytes=144 * GIB)
    resolved = resolve(EngineConfig(), hardware, LARGE)
    memory = resolved.memory
    assert (memory.total, memory.others) == (144 * GIB, 4 * GIB)
    assert memory.weights == 2 * LARGE.num_parameters
    assert memory.activations == 8192 * 200_000 + 256 * 128256 * 4 * 3
    left = 144 * GIB * 0.9 - 4 * GIB - memory.weights - memory.activations - memory.graphs
    assert memory.kv_cache == pytest.approx(left, abs=1)
    assert 0 <= memory.kv_cache - resolved.kv_cache_bytes < 64 * resolved.kv_bytes_per_token
    assert resolved.why["kv_cache_bytes"].startswith("what is left, as estimated")
    assert [name for name, _, _ in memory.lines()] == [
        "GPU memory", "in use", "activations", "graphs"
    ]  # fmt: skip
    assert resolve(EngineConfig(), CPU, SMALL).memory is None


def test_what_is_measured_takes_the_place_of_estimates():
    resolved = resolve(EngineConfig(), dataclasses.replace(GPU, total_bytes=144 * GIB), LARGE)
    measured = dataclasses.replace(
        resolved.memory, activations=30 * GIB, graphs=GIB, is_measured=True
    )
    after = with_measured_memory(resolved, EngineConfig(), measured)
    assert 0 <= measured.kv_cache - after.kv_cache_bytes < 64 * after.kv_bytes_per_token
    assert after.kv_cache_bytes < resolved.kv_cache_bytes - 25 * GIB
    assert after.max_model_len == 131072
    assert after.why["kv_cache_bytes"].startswith("what is left, at most")
    scarce = dataclasses.replace(measured, activations=107 * GIB)
    shorter = with_measured_memory(resolved, EngineConfig(), scarce)
    assert shorter.max_model_len == shorter.kv_capacity_tokens < 131072
    asked = EngineConfig(model_options=ModelOptions(max_model_len=131072))
    with pytest.raises(ConfigError, match="One needs 16384 MiB. Free memory, or give a smaller"):
        with_measured_memory(resolved, asked, scarce)
    given = EngineConfig(cache=CacheOptions(kv_cache_memory_bytes=90 * GIB))
    assert with_measured_memory(resolved, given, measured).kv_cache_bytes == 90 * GIB
    too_much = EngineConfig(cache=CacheOptions(kv_cache_memory_bytes=100 * GIB))
    with pytest.raises(ConfigError, match="100.0 GiB do not fit beside .* 94.0 GiB are free"):
        with_measured_memory(resolved, too_much, measured)
