"""CPU, memory, file descriptors and GPUs, read at each scrape. It knows nothing of requests.

GPU numbers come from NVML (NVIDIA Management Library) through `pynvml`, if both are there; their
absence is normal, never an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import psutil
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.observability.families import BY_NAME

logger = logging.getLogger(__name__)

Labels = tuple[str, ...]
Reading = tuple[str, Labels, float]
"""(family name, label values, value)"""


class ResourceCollector(Collector):
    """Collects the `process_`, `host_` and `gpu_` families."""

    name_prefixes = ("process_", "host_", "gpu_")

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._gpus: list[_Gpu] | None = None

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if self._gpus is None:
            self._gpus = open_gpus()
        readings = [*_process_readings(self._process), *_host_readings()]
        for gpu in self._gpus:
            readings += gpu.readings()
        metrics: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, labels, value in readings:
            if name not in metrics:
                family = BY_NAME[name]
                kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
                metrics[name] = kind(family.full_name, family.help, labels=family.labels)
            metrics[name].add_metric(labels, value)
        yield from metrics.values()


def _process_readings(process: psutil.Process) -> Iterator[Reading]:
    yield from _sum_readings("api", [process])
    # All children together are "the engine": its process and, with tensor parallelism, its workers.
    yield from _sum_readings("engine", process.children(recursive=True))


def _sum_readings(role: str, processes: list[psutil.Process]) -> Iterator[Reading]:
    cpu_seconds = resident = open_fds = 0.0
    seen = False
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory, fds = process.memory_info().rss, process.num_fds()
        except psutil.Error:  # it ended meanwhile
            continue
        seen = True
        cpu_seconds += times.user + times.system
        resident += memory
        open_fds += fds
    if seen:
        yield "process_cpu_seconds_total", (role,), cpu_seconds
        yield "process_resident_memory_bytes", (role,), resident
        yield "process_open_fds", (role,), open_fds


def _host_readings() -> Iterator[Reading]:
    yield "host_cpus", (), float(psutil.cpu_count() or 1)
    for mode, seconds in psutil.cpu_times()._asdict().items():
        # The kernel counts guest time in user time already.
        if not mode.startswith("guest"):
            yield "host_cpu_seconds_total", (mode,), seconds
    memory = psutil.virtual_memory()
    yield "host_memory_bytes", ("total",), float(memory.total)
    yield "host_memory_bytes", ("available",), float(memory.available)


class _Gpu:
    """One GPU as NVML sees it. A reading that the board does not offer is left out."""

    def __init__(self, nvml: ModuleType, index: int) -> None:
        self._nvml: Any = nvml
        self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = self._nvml.nvmlDeviceGetUUID(self._handle)
        self._labels = (str(index), uuid.decode() if isinstance(uuid, bytes) else uuid)

    def readings(self) -> Iterator[Reading]:
        nvml, handle, labels = self._nvml, self._handle, self._labels
        if (memory := self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))) is not None:
            yield "gpu_memory_bytes", (*labels, "total"), float(memory.total)
            yield "gpu_memory_bytes", (*labels, "used"), float(memory.used)
        if (rates := self._try(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))) is not None:
            yield "gpu_utilization_ratio", labels, rates.gpu / 100
        if (milliwatts := self._try(lambda: nvml.nvmlDeviceGetPowerUsage(handle))) is not None:
            yield "gpu_power_watts", labels, milliwatts / 1000
        sensor = nvml.NVML_TEMPERATURE_GPU
        celsius = self._try(lambda: nvml.nvmlDeviceGetTemperature(handle, sensor))
        if celsius is not None:
            yield "gpu_temperature_celsius", labels, float(celsius)

    def _try(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except self._nvml.NVMLError:
            return None


def open_gpus() -> list[_Gpu]:
    """The GPUs that NVML can see; empty without the library, the driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [_Gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        logger.info("No GPU metrics: NVML says %s.", error)
        return []
