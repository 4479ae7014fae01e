"""The Ray Serve application: one deployment whose replicas are each an API process with its engine.

`build_app` is what a Serve config names as `import_path`. Tokens never cross a Ray handle: Serve's
proxies hand a connection to a replica, and the app that `headrace serve` runs writes the answer.
"""

# No postponed annotations here: Serve validates a builder's arguments only if the annotation of
# its parameter is a class, not a string.

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


@serve.deployment(
    name="headrace",
    # The engine batches whatever comes and its own bounded queue answers 429 in OpenAI's words;
    # Serve's would answer in plain text.
    max_ongoing_requests=1_000_000,
    # A new version loads beside the old one, which serves until then.
    max_surge_percent=100,
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.2,
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Replica:
    """An API process with its engine beside it, as `headrace serve` runs them."""

    async def __init__(self, config: EngineConfig, options: ServerOptions) -> None:
        """Returns when the model is ready. Raises what Service raises: Ray reports it and tries
        again a few times, and a version that served before goes on serving."""
        configure_logging(options.log_level, options.log_format)
        self._lost: HeadraceError | None = None
        self._silence_limit = options.step_timeout
        self._service = Service(config, options, on_dead=self._on_dead)
        try:
            info = await self._service.start()
        except BaseException:
            await self._service.close()
            raise
        logger.info(
            "Serving %s on %s in %s, KV cache %d tokens",
            self._service.model.name,
            info.device,
            info.dtype,
            info.num_blocks * info.block_size,
        )

    def _on_dead(self, error: HeadraceError) -> None:
        self._lost = error

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service.app

    async def check_health(self) -> None:
        """Ray replaces the replica after this raised three times in a row.

        An engine that is being restarted is healthy; one that gave up, or that has been silent for
        longer than the time after which the client would have killed it, is not.
        """
        if self._lost is not None:
            raise self._lost
        silence = self._service.client.last_seen_age
        if silence > self._silence_limit:
            raise EngineError(f"The engine has ended no step for {silence:.0f} s.")

    async def __del__(self) -> None:
        """Ray calls it once requests are finished; the engine ends before the replica does."""
        service = getattr(self, "_service", None)
        if service is not None:
            service.drain()
            await service.close()


class BuildArgs(BaseModel):
    """`args` of an application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "", description="As for `headrace serve`; every node must be able to resolve it."
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
    deployment = Replica.options(
        ray_actor_options=_resources(config),
        graceful_shutdown_timeout_s=options.shutdown_timeout + ENGINE_CLOSE_SECONDS,
    )
    return deployment.bind(config, options)


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
