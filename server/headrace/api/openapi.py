"""The bodies in /openapi.json: endpoints read them themselves, so FastAPI has to be told."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headrace.api.batches import BatchRequest
from headrace.api.field_policy import HONOURED
from headrace.api.messages_protocol import HONOURED as HONOURED_IN_MESSAGES
from headrace.api.messages_protocol import CountTokensRequest, MessagesRequest
from headrace.api.pooling_protocol import (
    EmbeddingRequest,
    ModerationRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.api.protocol import (
    ApplyTemplateRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from headrace.api.responses_protocol import RESPONSES_HONOURED, ResponsesRequest, extensions

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/batches": BatchRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/rerank": RerankRequest,
    "/v2/rerank": RerankRequest,
    "/rerank": RerankRequest,
    "/v1/score": ScoreRequest,
    "/score": ScoreRequest,
    "/v1/moderations": ModerationRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/apply-template": ApplyTemplateRequest,
}
_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request is at fault; the message names the field and the remedy.",
    "401": "No key, or a wrong one.",
    "404": "Nothing of that name or id.",
    "500": "A bug, or a lost engine.",
    "503": "Loading or shutting down; come back after Retry-After seconds.",
}
_ERRORS_WITH_BODY = {
    "408": "The body did not arrive in time; the connection is closed.",
    "413": "The body is too large.",
    "429": "The queue is full; come back after Retry-After seconds.",
}
_ANTHROPIC = "/v1/messages"
_PROBES = ("/livez", "/readyz", "/health", "/version", "/metrics")
"""No key, no error: with 503 they say the same as with 200."""
_PAGE: dict[str, dict[str, Any]] = {
    "after": {"type": "string", "description": "The id that the last page ended with."},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"type": "string", "enum": ["asc", "desc"]},
}
_QUERIES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/files": {**_PAGE, "purpose": {"type": "string"}},
    "/v1/batches": _PAGE,
    "/load": {
        "model": {"type": "string", "description": "A served name."},
        "since": {"type": "integer", "minimum": 0, "description": "The last answer's `since`."},
    },
    "/v1/responses/{response_id}": {
        "stream": {"type": "boolean"},
        "starting_after": {"type": "integer", "minimum": 0},
    },
    "/v1/responses/{response_id}/input_items": _PAGE,
}


def describe(app: FastAPI) -> None:
    """Make `app.openapi` tell of bodies and answers. The work is done on the first request."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _add_bodies(schema)
            _add_parameters(schema)
            _add_answers(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(schema: dict[str, Any]) -> None:
    kinds = [(kind, "validation") for kind in dict.fromkeys(_BODIES.values())]
    _, definitions = models_json_schema(kinds, ref_template=_REF)  # type: ignore[arg-type]
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    of_chat = schemas[ChatCompletionRequest.__name__]["properties"]
    of_responses = schemas[ResponsesRequest.__name__]["properties"]
    of_responses |= {name: dict(of_chat[name]) for name in extensions()}
    for body, notes in (
        (ChatCompletionRequest, HONOURED),
        (CompletionRequest, HONOURED),
        (MessagesRequest, HONOURED_IN_MESSAGES),
        (CountTokensRequest, HONOURED_IN_MESSAGES),
        (ResponsesRequest, {**HONOURED, **RESPONSES_HONOURED}),
    ):
        for name, field in schemas[body.__name__]["properties"].items():
            if name in notes:
                field["description"] = notes[name]
    for path, kind in _BODIES.items():
        operation = schema["paths"][path]["post"]
        content = {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}
        operation["requestBody"] = {"required": True, "content": content}


def _add_answers(schema: dict[str, Any]) -> None:
    from headrace.api import openapi_answers

    answers, definitions = openapi_answers.schemas(_REF.format(model="{name}"))
    schema["components"]["schemas"].update(definitions)
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            route = f"{method.upper()} {path}"
            if route in answers:
                content = {"application/json": {"schema": answers[route]}}
            else:
                kind = openapi_answers.OTHER_CONTENT.get(route, "application/json")
                content = {kind: {"schema": {}}}
            if route in openapi_answers.STREAMS:
                content["text/event-stream"] = {"schema": {"type": "object"}}  # of each event
            operation["responses"] = {"200": {"description": "Done.", "content": content}}
            if path in _PROBES:
                operation["responses"]["503"] = {"description": "Not so.", "content": content}
            else:
                operation["responses"].update(_errors(path, "requestBody" in operation))


def _errors(path: str, has_body: bool) -> dict[str, Any]:
    anthropic = path.startswith(_ANTHROPIC)
    texts = {**_ERRORS, **(_ERRORS_WITH_BODY if has_body else {})}
    if anthropic:
        texts["529"] = texts.pop("429")
    kind = "MessagesError" if anthropic else "Error"
    content = {"application/json": {"schema": {"$ref": _REF.format(model=kind)}}}
    return {code: {"description": text, "content": content} for code, text in texts.items()}


def _add_parameters(schema: dict[str, Any]) -> None:
    """Handlers read them from the request: typed ones cost start-up time, see models.py."""
    for path, operations in schema["paths"].items():
        names = re.findall(r"{(\w+)}", path)
        for operation in operations.values():
            known = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
            if operation is operations.get("get"):
                known += [
                    {"name": name, "in": "query", "schema": kind}
                    for name, kind in _QUERIES.get(path, {}).items()
                ]
            if known:
                operation["parameters"] = known
