"""CPU, memory and GPU readings; NVML is played by a stand-in module, as most machines lack it."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from headrace.observability.resources import ResourceCollector


class FakeNVMLError(Exception):
    pass


def make_nvml(*, init_fails: bool = False) -> types.ModuleType:
    def init() -> None:
        if init_fails:
            raise FakeNVMLError("Driver Not Loaded")

    def no_power(handle: int) -> int:
        raise FakeNVMLError("Not Supported")

    nvml = types.ModuleType("pynvml")
    nvml.__dict__.update(
        NVMLError=FakeNVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: b"GPU-1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=1000, used=250),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40),
        nvmlDeviceGetPowerUsage=no_power,
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
    )
    return nvml


def readings() -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("headrace_"), *sample.labels.values()): sample.value
        for metric in ResourceCollector().collect()
        for sample in metric.samples
    }


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    code = "import sys; sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        yield process


def test_this_process_and_its_children_are_told_apart(child: subprocess.Popen[bytes]) -> None:
    found = readings()
    for role in ("api", "engine"):
        assert found["process_resident_memory_bytes", role] > 2**20
        assert found["process_open_fds", role] >= 3
        assert found["process_cpu_seconds_total", role] >= 0


def test_host_memory_and_cpu() -> None:
    found = readings()
    assert 0 < found["host_memory_bytes", "available"] <= found["host_memory_bytes", "total"]
    assert found["host_cpus",] >= 1
    assert found["host_cpu_seconds_total", "idle"] > 0


def test_gpu_readings_leave_out_what_the_board_does_not_offer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml())
    gpu = {key: value for key, value in readings().items() if key[0].startswith("gpu_")}
    assert gpu == {
        ("gpu_memory_bytes", "0", "GPU-1", "total"): 1000,
        ("gpu_memory_bytes", "0", "GPU-1", "used"): 250,
        ("gpu_utilization_ratio", "0", "GPU-1"): 0.4,
        ("gpu_temperature_celsius", "0", "GPU-1"): 61,
    }


@pytest.mark.parametrize("nvml", [None, make_nvml(init_fails=True)], ids=["absent", "no driver"])
def test_no_gpu_is_no_error(monkeypatch: pytest.MonkeyPatch, nvml: types.ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None makes the import fail
    assert not [key for key in readings() if key[0].startswith("gpu_")]
