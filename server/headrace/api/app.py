"""The ASGI application: routes, middleware and error answers put together.

Loads neither torch nor an engine: both are behind the clients in the model table.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from headrace.api import (
    admin,
    batches,
    docs,
    embeddings,
    files,
    health,
    load,
    messages,
    models,
    moderations,
    openapi,
    playground,
    rerank,
    responses,
    score,
    tokenize,
)
from headrace.api.api_config import ApiConfig
from headrace.api.chat import create_chat_completion
from headrace.api.completions import create_completion
from headrace.api.error_response import on_headrace_error, on_http_exception
from headrace.api.ledger import MetricsSink, RequestLedger
from headrace.api.middleware import RequestMiddleware
from headrace.api.model_table import ModelTable
from headrace.api.services import Services
from headrace.errors import HeadraceError

EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "retry-after",
    "openai-processing-ms",
    "server-timing",
    "headrace-sampling",
)


def create_app(table: ModelTable, config: ApiConfig, metrics: MetricsSink) -> FastAPI:
    """The application. `app.state.services` holds what the process around it needs:

    * `services.draining = True` on SIGTERM;
    * `services.ledger.close` is to be called with every engine's records;
    * `services.store`: an open store; without it files and batches are refused, and no response
      is kept;
    * `services.models` may be filled before or after: an entry without text is "loading".
    """
    services = Services(config=config, models=table, metrics=metrics, ledger=RequestLedger(metrics))
    # Without FastAPI's own pages: they load scripts from elsewhere.
    app = FastAPI(title="Headrace", version=config.version, docs_url=None, redoc_url=None)
    app.state.services = services
    app.add_exception_handler(HeadraceError, on_headrace_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_api_route("/v1/chat/completions", create_chat_completion, methods=["POST"])
    app.add_api_route("/v1/completions", create_completion, methods=["POST"])
    for router in (
        messages.router,
        models.router,
        tokenize.router,
        health.router,
        load.router,
        files.router,
        batches.router,
        responses.router,
        embeddings.router,
        rerank.router,
        score.router,
        moderations.router,
        admin.router,
        docs.router,
        playground.router,
    ):
        app.include_router(router)
    openapi.describe(app)
    app.add_middleware(RequestMiddleware, services=services)
    # Around all others, so that a page can read refusals, too.
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app
