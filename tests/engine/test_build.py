"""What is refused before weights are read, and what an engine on a GPU is made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.engine.fake_cuda import FakeDevice, fake_kernels

from headrace import cli
from headrace.config import CacheOptions, DeviceOptions, EngineConfig, ModelOptions
from headrace.engine import build, cuda_runner, plan
from headrace.engine.build import build_engine
from headrace.engine.memory import MemoryBudget
from headrace.engine.resolution import Hardware
from headrace.errors import ConfigError
from headrace_kernels import dispatch

REFERENCES = tuple(f"{stem}=reference" for stem in dispatch.OPS)


def test_a_page_size_that_no_kernel_takes_is_refused_with_one_that_works(checkpoint, monkeypatch):
    monkeypatch.setattr(build, "_load_model", lambda *_: pytest.fail("weights were read"))
    config = EngineConfig(
        model=str(checkpoint),
        cache=CacheOptions(block_size=48),
        device=DeviceOptions(device="cpu", kernel=REFERENCES),
    )
    with pytest.raises(ConfigError, match=r"page size 48 does not divide .* --block-size 32 works"):
        build_engine(config)


class FakeGpu(FakeDevice):
    """On which a model takes 1 MB of weights and each graph 20 kB."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.free = [8_000_000, 7_000_000, 6_980_000]

    def free_bytes(self) -> int:
        return self.free.pop(0)

    def release_unused(self) -> None: ...


@pytest.fixture
def fake_gpu(checkpoint, monkeypatch):
    """build_engine as on a GPU, with everything on the CPU but the name of the device: a function
    of whether kernels can be captured that gives the configuration and the devices that are made.
    """
    config = EngineConfig(
        model=str(checkpoint),
        model_options=ModelOptions(dtype="float32"),
        device=DeviceOptions(device="cpu", kernel=REFERENCES),
    )
    on_cpu = plan.make_plan(config)
    facts, load = build.kernel_facts(on_cpu.resolved, on_cpu.model), build._load_model

    def on_a_gpu(config):
        memory = MemoryBudget(
            total=10_000_000, others=1_000_000, weights=1, activations=1, graphs=1
        )
        resolved = dataclasses.replace(on_cpu.resolved, device="cuda:0", memory=memory)
        return dataclasses.replace(on_cpu, resolved=resolved)

    def set_up(graphs: bool) -> tuple[EngineConfig, list[FakeGpu]]:
        made: list[FakeGpu] = []

        def load_on_cpu(found, *rest):
            model = load(dataclasses.replace(found, resolved=on_cpu.resolved), *rest)
            model.context.kernels = fake_kernels(model.context.kernels, capturable=graphs)
            return model

        def device_of(device: torch.device) -> FakeGpu:
            made.append(FakeGpu(device))
            return made[-1]

        monkeypatch.setattr(build, "TorchCudaDevice", device_of)
        monkeypatch.setattr(build, "make_plan", on_a_gpu)
        monkeypatch.setattr(build, "_load_model", load_on_cpu)
        monkeypatch.setattr(build, "kernel_facts", lambda *_: facts)
        return config, made

    return set_up


@pytest.mark.parametrize("graphs", [True, False])
def test_an_engine_on_a_gpu_measures_its_memory(fake_gpu, caplog, graphs):
    config, made = fake_gpu(graphs)
    engine = build_engine(config)
    assert len(made) == 1 and made[0].free == []
    # 90% of 10 MB, without 1 MB of others, 1 MB of weights, 1 MB of activations, 20 kB a graph.
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head size, float32
    num_graphs = len(engine._runner.graphs.sizes) if graphs else 1
    room = 9_000_000 - 3_000_000 - 20_000 * num_graphs
    assert engine.info.num_blocks == min(room, 64 * 512 * per_token) // (per_token * 16)
    assert engine._runner.overlaps and len(engine._runner._kv_layers[0]) == engine.info.num_blocks
    if graphs:
        assert engine._runner.graphs.captured == [256] and num_graphs == 20
    else:
        assert "without CUDA graphs: the references of activation, attention" in caplog.text


def test_memory_that_is_gone_when_the_cache_is_made_is_told_with_a_remedy(fake_gpu, monkeypatch):
    config, _ = fake_gpu(False)
    make = cuda_runner.kv_layers

    def scarce(model, *, num_blocks, **options):
        if num_blocks > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(model, num_blocks=num_blocks, **options)

    monkeypatch.setattr(cuda_runner, "kv_layers", scarce)
    with pytest.raises(ConfigError, match="does not fit on cuda:0, .* --kv-cache-memory-bytes"):
        build_engine(config)


def test_the_plan_of_a_gpu_shows_how_its_memory_is_shared_out(checkpoint, monkeypatch, capsys):
    gpu = Hardware(
        device="cuda:0",
        name="a GPU",
        cores=2,
        memory_bytes=3 << 29,
        total_bytes=2 << 30,
        has_bf16=True,
    )
    monkeypatch.setattr(plan, "probe", lambda *args, **options: gpu)
    assert cli.main(["plan", str(checkpoint), "--dtype", "bfloat16"]) == 0
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2.00 GiB" in shown["GPU memory"] and "90% of it" in shown["GPU memory"]
    assert "512 MiB" in shown["in use"]
    for name in ("activations", "graphs"):
        assert "estimate; measured when the model is loaded" in shown[name]
    assert "what is left, as estimated" in shown["KV cache"]
