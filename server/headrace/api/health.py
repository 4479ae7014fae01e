"""Is the process alive, may it get requests, what is it: for probes, balancers and people."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.api.error_response import json_response
from headrace.api.services import Services, services_of
from headrace.engine.client import EngineState

router = APIRouter()


@router.get("/livez")
async def livez(request: Request) -> Response:
    """503 when an engine is dead for good, or has given no sign of life for too long: restart the
    process. Loading, restarting and draining are alive."""
    services = services_of(request)
    limit = services.config.step_age_limit
    engines: dict[str, Any] = {}
    alive = True
    for model in services.models:
        client = model.client
        age = client.last_seen_age
        stuck = client.state is EngineState.READY and age > limit
        alive = alive and not stuck and client.state is not EngineState.DEAD
        engines[model.name] = {
            "state": "stuck" if stuck else str(client.state),
            "step_age_seconds": round(age, 3),
            "restarts": client.restarts,
        }
    content = {"status": "alive" if alive else "dead", "engines": engines}
    return json_response(content, 200 if alive else 503)


@router.get("/readyz")
@router.get("/health")
async def readyz(request: Request) -> Response:
    """503 while loading, restarting or draining: send requests elsewhere."""
    status = _readiness(services_of(request))
    response = json_response({"status": status}, 200 if status == "ready" else 503)
    if status != "ready":
        response.headers["retry-after"] = "1"
    return response


@router.get("/version")
async def version(request: Request) -> Response:
    """The version of this server."""
    return json_response({"version": services_of(request).config.version})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    services = services_of(request)
    sink = services.metrics
    text = sink.render() if services.scrape is None else await services.scrape()
    return Response(text, headers={"content-type": sink.content_type})


def _readiness(services: Services) -> str:
    if services.draining:
        return "draining"
    if not len(services.models):
        return "loading"
    for model in services.models:
        if not model.ready:
            state = model.client.state
            return "loading" if state is EngineState.READY else str(state)
    return "ready"
