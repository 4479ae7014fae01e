"""GET /v1/models and /v1/models/{id}: what is served, in OpenAI's shape plus its identity."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from headrace.api.error_response import json_response
from headrace.api.model_table import ServedModel, UnservedVersion
from headrace.api.services import services_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The served names."""
    models = services_of(request).models
    data = [_card(model, name) for model in models for name in (model.name, *model.aliases)]
    data += [_unserved_card(version) for version in models.unserved]
    return json_response({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request) -> Response:
    """One served name, with what its engine chose."""
    # A typed path parameter would make FastAPI import pydantic.v1, a third of the start-up time.
    model_id: str = request.path_params["model_id"]
    models = services_of(request).models
    for version in models.unserved:
        if version.name == model_id:
            return json_response({**_unserved_card(version), "engine": None})
    model = models.find(model_id)
    engine = msgspec.to_builtins(model.client.info)  # None while loading
    return json_response({**_card(model, model_id), "engine": engine})


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    info = model.client.info
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "root": model.name,
        "max_model_len": info.max_model_len if info else None,
        "tasks": info.tasks if info else None,
        "digest": model.digest or None,
        "revision": model.revision or None,
        "version": model.version,
        "state": str(model.client.state),
        "reason": None,
    }


def _unserved_card(version: UnservedVersion) -> dict[str, Any]:
    return {
        "id": version.name,
        "object": "model",
        "created": 0,
        "owned_by": "headrace",
        "root": version.name,
        "max_model_len": None,
        "tasks": None,
        "digest": None,
        "revision": str(version.version),
        "version": version.version,
        "state": version.state,
        "reason": version.reason or None,
    }
