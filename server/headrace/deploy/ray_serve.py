"""The Ray Serve application: one deployment whose replicas are each an API process with its engine.

`build_app` is what a Serve config names as `import_path`. Tokens never cross a Ray handle: Serve's
proxies hand a connection to a replica, and the app that `headrace serve` runs writes the answer.
"""

# No postponed annotations here: Serve validates a builder's arguments only if the annotation of
# its parameter is a class, not a string.

import asyncio
import logging
import socket
from contextlib import AsyncExitStack

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from headrace import __version__
from headrace.api.load import load_of
from headrace.config import EngineConfig, ServerOptions
from headrace.deploy import autoscaling
from headrace.deploy.build_args import BuildArgs, check_options, resources_of
from headrace.deploy.past_ray import CountingPastRay, PastRay
from headrace.deploy.registry import Membership, Registration
from headrace.errors import ConfigError, EngineError, HeadraceError
from headrace.listening import listen, url_of
from headrace.observability.logging import configure_logging
from headrace.serve import Service, answering

logger = logging.getLogger(__name__)

ENGINE_CLOSE_SECONDS = 10.0
"""What ending the engine may take on top of `shutdown_timeout`, before Ray kills the replica."""


class Replica:
    """An API process with its engine beside it, as `headrace serve` runs them.

    It answers at Serve's port and at one of its own, which the registry knows: the door and
    Prometheus reach this replica there, and no other one.
    """

    def __init__(
        self, config: EngineConfig, options: ServerOptions, ports: tuple[int, int] | None = None
    ) -> None:
        """`ports`: the first and the last that the replica may take; None: any free one."""
        self._config = config
        self._options = options
        self._ports = ports
        self._service: Service | None = None
        self._own_port = AsyncExitStack()
        self._membership: Membership | None = None
        self._lost: HeadraceError | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray calls it after the constructor: the app, once the model is ready.

        Raises what Service raises. Ray logs it and tries again a few times; a version that served
        before goes on serving.
        """
        configure_logging(self._options.log_level, self._options.log_format)
        # It may have to download the model first.
        self._service = service = await asyncio.to_thread(
            Service, self._config, self._options, on_dead=self._on_dead
        )
        # Ray's dashboard for LLMs knows vLLM's names with this prefix, and joins them by worker.
        worker, context = ray.get_runtime_context().get_worker_id(), serve.get_replica_context()
        service.metrics.alias_as("ray_vllm_", WorkerId=worker)
        past_ray = PastRay(
            application=context.app_name,
            deployment=context.deployment,
            replica=context.replica_tag,
            worker=worker,
        )
        service.metrics.registry.register(past_ray)
        service.app.add_middleware(CountingPastRay, counted=past_ray)
        try:
            info = await service.start()
            host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            listener = listen_in(host, self._ports)
            past_ray.port = listener.getsockname()[1]
            await self._own_port.enter_async_context(answering(service, listener))
        except BaseException:
            await service.close()
            raise
        self._membership = Membership(self._registration(service, url_of(listener)))
        logger.info(
            "Serving %s on %s in %s, KV cache %d tokens, own port %s",
            service.model.name,
            info.device,
            info.dtype,
            info.num_blocks * info.block_size,
            url_of(listener),
        )
        return service.app

    def _registration(self, service: Service, url: str) -> Registration:
        context = serve.get_replica_context()
        return Registration(
            application=context.app_name,
            replica=context.replica_tag,
            url=url,
            node=ray.get_runtime_context().get_node_id(),
            model=service.model.name,
            version=__version__,
        )

    def _on_dead(self, error: HeadraceError) -> None:
        self._lost = error

    async def check_health(self) -> None:
        """Ray replaces the replica after this has raised three times in a row.

        An engine that is being restarted is healthy. One that has given up is not, nor one that
        stays silent for longer than the time after which its client kills it.
        """
        assert self._service is not None, "Ray asks only those that have an app"
        if self._lost is not None:
            raise self._lost
        silence = self._service.client.last_seen_age
        if silence > self._options.step_timeout:
            raise EngineError(f"The engine has ended no step for {silence:.0f} s.")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The numbers that autoscaling.SloPolicy reads, which Ray sends to its controller."""
        assert self._service is not None, "Ray asks only those that have an app"
        load = load_of(self._service.model, draining=False)
        return autoscaling.report(load, self._service.metrics.totals)

    async def __del__(self) -> None:
        """Ray calls it when the requests that came through its proxies are finished. Those that
        came to the replica's own port finish now; then the engine ends, before the replica.

        A replica that is killed takes its engine with it, too: the engine watches its parent.
        """
        if self._service is None:
            return
        if self._membership is None:
            await self._service.close()
            return
        await self._membership.leave()
        self._service.drain()
        await self._service.drained(self._options.shutdown_timeout)
        await self._own_port.aclose()  # closes the service, too


def listen_in(host: str, ports: tuple[int, int] | None) -> socket.socket:
    """A socket that listens at a free port from the first to the last of `ports`, or any.

    Raises ConfigError if each of them is taken.
    """
    if ports is None:
        return listen(host, 0)
    for port in range(ports[0], ports[1] + 1):
        try:
            return listen(host, port)
        except ConfigError:
            continue
    raise ConfigError(
        f"replica_ports: {ports[0]} to {ports[1]} are all taken on {host}. Give as many ports as "
        "replicas may run on a node during a rollout, or leave replica_ports out."
    )


deployment = serve.deployment(
    name="headrace",
    # The engine batches whatever comes, and its own bounded queue answers 429 in OpenAI's words;
    # Serve's would answer in plain text.
    max_ongoing_requests=1_000_000,
    # A new version loads beside the old one, which serves until then.
    max_surge_percent=100,
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.2,
)(serve.ingress()(Replica))


def build_app(args: BuildArgs) -> Application:
    """The application for a Serve config file or `serve.run`.

    Replica counts, autoscaling and resources are Ray's: `deployments` in the config overrides
    whatever is set here. Raises ConfigError for unknown or impossible options, all of them.
    """
    config, options = args.load()
    return make_application(config, options, ports=args.replica_ports)


def make_application(
    config: EngineConfig,
    options: ServerOptions,
    *,
    num_replicas: int = 1,
    ports: tuple[int, int] | None = None,
) -> Application:
    """The application for a model and its options; `build_app` for those who have both typed."""
    check_options(options)
    configured = deployment.options(
        num_replicas=num_replicas,
        ray_actor_options=resources_of(config),
        graceful_shutdown_timeout_s=options.shutdown_timeout + ENGINE_CLOSE_SECONDS,
    )
    application: Application = configured.bind(config, options, ports)
    return application
