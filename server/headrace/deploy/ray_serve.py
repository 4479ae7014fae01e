"""The Ray Serve application: one deployment whose replicas are each an API process with its engine.

`build_app` is what a Serve config names as `import_path`. Tokens never cross a Ray handle: Serve's
proxies hand a connection to a replica, and the app that `headrace serve` runs writes the answer.
"""

# No postponed annotations here: Serve validates a builder's arguments only if the annotation of
# its parameter is a class, not a string.

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from headrace.config import EngineConfig, ServerOptions, load_options
from headrace.errors import ConfigError, EngineError, HeadraceError
from headrace.observability.logging import configure_logging
from headrace.serve import Service

logger = logging.getLogger(__name__)

ENGINE_CLOSE_SECONDS = 10.0
"""What ending the engine may take on top of `shutdown_timeout`, before Ray kills the replica."""


class Replica:
    """An API process with its engine beside it, as `headrace serve` runs them."""

    def __init__(self, config: EngineConfig, options: ServerOptions) -> None:
        self._config = config
        self._options = options
        self._service: Service | None = None
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
        try:
            info = await service.start()
        except BaseException:
            await service.close()
            raise
        logger.info(
            "Serving %s on %s in %s, KV cache %d tokens",
            service.model.name,
            info.device,
            info.dtype,
            info.num_blocks * info.block_size,
        )
        return service.app

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

    async def __del__(self) -> None:
        """Ray calls it when requests are finished, so that the engine ends before the replica.

        A replica that is killed takes its engine with it, too: the engine watches its parent.
        """
        if self._service is not None:
            await self._service.close()


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


class BuildArgs(BaseModel):
    """`args` of an application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        default="", description="As for `headrace serve`; every node must be able to resolve it."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of `headrace serve` by name, such as threads."
    )


def build_app(args: BuildArgs) -> Application:
    """The application for a Serve config file or `serve.run`.

    Replica counts, autoscaling and resources are Ray's: `deployments` in the config overrides
    whatever is set here. Raises ConfigError for an unknown or impossible option.
    """
    for name in ("host", "port"):
        if name in args.options:
            raise ConfigError(
                f"options.{name}: under Ray Serve the proxies listen; give it as "
                f"http_options.{name} at the top of the Serve config."
            )
    config, options, _ = load_options(args.model, {}, args.options)
    return make_application(config, options)


def make_application(
    config: EngineConfig, options: ServerOptions, *, num_replicas: int = 1
) -> Application:
    """The application for a model and its options; `build_app` for those who have both typed."""
    if options.api_processes != 1:
        raise ConfigError(
            "options.api_processes: a replica is one API process; ask for more replicas instead."
        )
    configured = deployment.options(
        num_replicas=num_replicas,
        ray_actor_options=_resources(config),
        graceful_shutdown_timeout_s=options.shutdown_timeout + ENGINE_CLOSE_SECONDS,
    )
    application: Application = configured.bind(config, options)
    return application


def _resources(config: EngineConfig) -> dict[str, float]:
    """What Ray reserves for a replica, so that it places as many on a node as fit."""
    device, _, index = config.device.device.partition(":")
    if index:
        raise ConfigError(
            f"options.device: {config.device.device}: Ray chooses the GPU of a replica; say cuda."
        )
    resources: dict[str, float] = {"num_cpus": config.device.threads or 1}
    if device == "cuda":
        resources["num_gpus"] = 1
    return resources
