"""CPU, memory, file descriptors and GPUs, read at each scrape. It knows nothing of requests.

GPU numbers come from NVML (NVIDIA Management Library) through `pynvml`, if both are there; their
absence is normal, never an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
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

    def __init__(self, api_pids: Callable[[], Collection[int]] = lambda: ()) -> None:
        """`api_pids`: children of this process that count as "api", like itself."""
        self._process = psutil.Process()
        self._api_pids = api_pids
        self._cpu = {"api": _CpuSeconds(), "engine": _CpuSeconds()}
        self._gpus: list[_Gpu] | None = None

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if self._gpus is None:
            self._gpus = open_gpus()
        readings = [*self._process_readings(), *_host_readings()]
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

    def _process_readings(self) -> Iterator[Reading]:
        api_pids = set(self._api_pids())
        api: list[psutil.Process] = [self._process]
        engine: list[psutil.Process] = []
        # All other children are "the engine": its process, with tensor parallelism its workers.
        for child in self._process.children(recursive=True):
            (api if child.pid in api_pids else engine).append(child)
        yield from _sum_readings("api", api, self._cpu["api"])
        yield from _sum_readings("engine", engine, self._cpu["engine"])


class _CpuSeconds:
    """CPU time of some processes; what those used that have ended stays counted."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._ended = 0.0

    def total(self, now: dict[int, float]) -> float:
        """`now`: pid -> seconds, of those that live."""
        for pid, seconds in self._last.items():
            if now.get(pid, 0.0) < seconds:  # gone, or another process under its number
                self._ended += seconds
        self._last = now
        return self._ended + sum(now.values())


def _sum_readings(
    role: str, processes: list[psutil.Process], cpu: _CpuSeconds
) -> Iterator[Reading]:
    resident = open_fds = 0.0
    cpu_seconds: dict[int, float] = {}
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory, fds = process.memory_info().rss, process.num_fds()
        except psutil.Error:  # it ended meanwhile
            continue
        cpu_seconds[process.pid] = times.user + times.system
        resident += memory
        open_fds += fds
    total = cpu.total(cpu_seconds)
    if cpu_seconds:
        yield "process_cpu_seconds_total", (role,), total
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
