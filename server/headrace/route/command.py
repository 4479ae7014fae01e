"""`headrace route` as the command line calls it: reads options, says what it found, serves."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import uvloop
from rich.console import Console

from headrace.errors import ConfigError
from headrace.observability.logging import configure_logging
from headrace.route import processes, run
from headrace.route.config import (
    RouteConfig,
    parse_config,
    parse_replicas,
    target_name,
    with_changes,
)
from headrace.route.door import Door

logger = logging.getLogger(__name__)


def route(
    read: Callable[[], Mapping[str, Any]] | None,
    path: str,
    replicas: Sequence[str],
    flags: Mapping[str, Any],
) -> int:
    """Serve until a signal; the exit status.

    read: gives the content of the YAML file at `path`, again on SIGHUP; None without a file.
    replicas: NAME=URL each. flags: those that were given, by their keys in the file. Raises
    ConfigError.
    """
    if (read is None) == (not replicas):
        raise ConfigError("headrace route takes either FILE.yaml or --replica NAME=URL.")

    def load() -> RouteConfig:
        if read is not None:
            return with_changes(parse_config(read(), origin=path), origin="flags", **flags)
        models = parse_replicas(replicas)
        return with_changes(RouteConfig(), origin="flags", models=models, **flags)

    def reread() -> RouteConfig | None:
        try:
            return load()
        except ConfigError as error:
            logger.error("The configuration stays as it is: %s", error.message)
            return None

    config = load()
    configure_logging(config.log_level, config.log_format)
    console = Console(stderr=True, highlight=False)
    if config.host not in ("127.0.0.1", "::1", "localhost") and not config.api_key:
        console.print(
            f"[yellow]Warning:[/] listening on {config.host} without api_key: whoever reaches this "
            "address can use what the replicas let in.",
            soft_wrap=True,
        )
    if config.processes > 1:
        return processes.run_several(
            config, on_ready=partial(_print, console, config, None), reread=reread
        )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run.run(config, on_ready=partial(_print, console, config), reread=reread))


def _print(console: Console, config: RouteConfig, door: Door | None, url: str) -> None:
    """What is behind the door, where one process knows, and how to ask it."""
    console.print()
    for name, model in config.models.items():
        known = door.fleet.applications if door is not None else {}
        replicas = known.get(target_name(name, model), [])
        ready = sum(it.usable for it in replicas)
        found = f"{ready} of {len(replicas)} replicas ready" if replicas else "no replica yet"
        if door is None:
            found = f"{len(model.replicas)} replicas" if model.replicas else model.application
        names = ", ".join((name, *model.aliases))
        console.print(f"  [bold]{'Model':<10}[/]{names}: {found}", soft_wrap=True)
    console.print(f"  [bold]{'URL':<10}[/]{url}/v1", soft_wrap=True)
    body = f'{{"model": "{config.default_model}", "messages": [{{"role": "user", "content": '
    console.print(
        f"\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '"
        + body
        + '"Hello!"}]}\'\n',
        markup=False,
        soft_wrap=True,
    )
    sys.stderr.flush()
