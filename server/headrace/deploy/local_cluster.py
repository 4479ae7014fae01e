"""A Ray of one machine, serving one model, that lives as long as the command that starts it.

Clusters that exist already take `ray_serve.build_app` through Serve's own tools instead.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType

from headrace.config import EngineConfig, ServerOptions
from headrace.deploy.switches import set_local_switches
from headrace.errors import ConfigError, EngineError
from headrace.listening import listen
from headrace.observability.logging import configure_logging
from headrace.serve import EXIT_INTERRUPTED, EXIT_OK

logger = logging.getLogger(__name__)

APPLICATION = "headrace"
OBJECT_STORE_BYTES = 100 << 20
"""Ray would reserve 30% of the memory, and nothing of ours passes through it."""
READY_TIMEOUT = 30.0
"""Seconds between Serve's "running" and a route that leads there."""


def run(config: EngineConfig, options: ServerOptions, *, num_replicas: int = 1) -> int:
    """Start Ray, Serve and the model, and serve until SIGTERM or SIGINT; the exit status.

    The first signal lets requests finish within `shutdown_timeout`, a second one ends everything at
    once. Raises ConfigError for an address or a number of replicas that cannot be had, EngineError
    for a model that cannot be served.
    """
    if num_replicas < 1:
        raise ConfigError(f"--num-replicas must be at least 1, got {num_replicas}.")
    with listen(options.host, options.port) as listener:
        options = replace(options, port=listener.getsockname()[1])
    configure_logging(options.log_level, options.log_format)
    set_local_switches()
    import ray

    signals = _Signals()
    try:
        try:
            _start_ray()
            signals.install()  # ray.init has put a handler of its own in place
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            config = share_machine(config, resources, num_replicas)
            _deploy(config, options, num_replicas)
            _announce(options)
            while True:
                signal.pause()
        except (_StopError, SystemExit):  # SystemExit: a signal while ray.init ran
            logger.warning("Finishing requests, then stopping; another signal stops at once")
            _undeploy(options)
            return EXIT_OK
    except _StopError:
        return EXIT_INTERRUPTED
    finally:
        signals.patience = 0
        ray.shutdown()


def _start_ray() -> None:
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )


def share_machine(
    config: EngineConfig, resources: Mapping[str, float], num_replicas: int
) -> EngineConfig:
    """`config` with the device and the threads of one replica of `num_replicas`.

    resources: as `ray.cluster_resources()` counts them. Raises ConfigError if they do not suffice.
    """
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    device = config.device.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    threads = config.device.threads
    if device == "cpu":
        threads = threads or max(1, cores // num_replicas)
    for name, needed, present in (
        ("threads", (threads or 1) * num_replicas, cores),
        ("GPUs", num_replicas if device == "cuda" else 0, gpus),
    ):
        if needed > present:
            raise ConfigError(
                f"{num_replicas} replicas need {needed} {name}, and this machine has {present}. "
                "Lower --num-replicas or threads."
            )
    return replace(config, device=replace(config.device, device=device, threads=threads))


def _deploy(config: EngineConfig, options: ServerOptions, num_replicas: int) -> None:
    """Returns when the application runs."""
    from ray import serve

    from headrace.deploy.ray_serve import make_application

    quiet = {"log_level": "CRITICAL", "enable_access_log": False}  # our own records say it shorter
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": options.host, "port": options.port},
        logging_config=quiet,
    )
    application = make_application(config, options, num_replicas=num_replicas)
    try:
        serve.run(application, name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:
        status = serve.status().applications[APPLICATION]
        messages = [deployment.message for deployment in status.deployments.values()]
        raise EngineError(root_cause("\n".join(messages) or str(error))) from None


def root_cause(message: str) -> str:
    """What our own exception says at the end of the traceback in which Ray reports it, or else the
    report's last line."""
    lines = [line for line in message.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("headrace.errors.")]
    return (ours or lines)[-1]


def _undeploy(options: ServerOptions) -> None:
    """Take no new requests and wait for those that run, for as long as replicas do."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    deadline = time.monotonic() + options.shutdown_timeout
    while ray.is_initialized():
        try:
            serve.delete(APPLICATION)
            return
        except RayServeException:  # the signal came before Serve had started
            return
        except TimeoutError:  # Ray waits 60 s; replicas may have been given more
            if time.monotonic() > deadline:
                return


def _announce(options: ServerOptions) -> None:
    """Wait until requests reach the model, then say how to send one."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}"
    deadline = time.monotonic() + READY_TIMEOUT
    while _get(f"{url}/readyz", options) is None:
        if time.monotonic() > deadline:
            raise EngineError(f"The model is loaded, but {url}/readyz does not say so.")
        time.sleep(0.1)
    models = json.loads(_get(f"{url}/v1/models", options) or b"{}")
    name = models["data"][0]["id"]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    key = "    -H 'Authorization: Bearer YOUR_KEY' \\\n" if options.api_key else ""
    print(
        f"\n  {name} on Ray Serve: {url}/v1\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"{key}    -d '{body}'\n",
        file=sys.stderr,
        flush=True,
    )


def _get(url: str, options: ServerOptions) -> bytes | None:
    """The body of a 200, or None."""
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return bytes(response.read())
    except OSError:  # urllib's HTTP errors are OSErrors, too
        return None


class _StopError(BaseException):
    """A signal asked for the end. Not an Exception: nothing in between may swallow it."""


class _Signals:
    """SIGTERM and SIGINT: two of them raise _StopError, one more ends the process as it is."""

    def __init__(self) -> None:
        self.patience = 2
        self.install()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.patience:
            os._exit(EXIT_INTERRUPTED)  # Ray's processes watch this one and follow
        self.patience -= 1
        raise _StopError
