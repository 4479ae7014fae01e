"""What an operator asks of a running server: its facts, and an empty prefix cache.

The paths are vLLM's and SGLang's, which load tools use. Both need the API key, if there is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from headrace.api.error_response import json_response
from headrace.api.model_table import ServedModel
from headrace.api.services import services_of
from headrace.errors import UnavailableError

router = APIRouter()


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """Version, limits, and for each model what its engine chose and how it is."""
    services = services_of(request)
    config = dataclasses.asdict(services.config)
    version = config.pop("version")
    config["api_key_required"] = bool(config.pop("api_keys"))
    return json_response(
        {
            "version": version,
            "draining": services.draining,
            "api": config,
            "models": [_facts(model) for model in services.models],
        }
    )


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Empty the prefix cache of each engine. 503 if one of them has requests: nothing that they
    use can be dropped."""
    for model in services_of(request).models:
        if not await model.client.reset_prefix_cache():
            raise UnavailableError(
                f"The prefix cache of {model.name!r} was not reset: requests are running, or its "
                "engine is not ready. Try again when it is idle.",
                retry_after=1.0,
            )
    return json_response({"reset": True})


def _facts(model: ServedModel) -> dict[str, Any]:
    client = model.client
    return {
        "name": model.name,
        "aliases": model.aliases,
        "digest": model.digest or None,
        "revision": model.revision or None,
        "state": str(client.state),
        "restarts": client.restarts,
        "engine": msgspec.to_builtins(client.info),  # None while loading
        "stats": msgspec.to_builtins(client.stats),
    }
