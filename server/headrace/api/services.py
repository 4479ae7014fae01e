"""What the endpoints share: options, models, accounts, and whether the server is draining."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request

from headrace.api.api_config import ApiConfig
from headrace.api.background import BackgroundWork
from headrace.api.ledger import MetricsSink, RequestLedger
from headrace.api.model_table import ModelTable
from headrace.api.open_requests import OpenRequests
from headrace.api.prefix_news import PrefixNews
from headrace.api.store import Store
from headrace.errors import HeadraceError, UnavailableError, error_body


@dataclass(slots=True, kw_only=True)
class Services:
    """Lives in `app.state.services`."""

    config: ApiConfig
    models: ModelTable
    metrics: MetricsSink
    ledger: RequestLedger
    scrape: Callable[[], Awaitable[bytes]] | None = None
    """Gives the metrics of all API processes, where there are several."""
    draining: bool = False
    """Set on SIGTERM: not ready, no new requests, running ones go on."""
    open_requests: OpenRequests = field(default_factory=OpenRequests)
    store: Store | None = None
    """Open while there is one; see `kept`."""
    store_problem: str = "This server was started without a data folder; give it --data-dir."
    """Why there is no store."""
    background: BackgroundWork = field(default_factory=BackgroundWork)
    """Responses that are made after their requests have been answered."""
    prefix_news: PrefixNews = field(default_factory=PrefixNews)
    batch_news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a batch was made or is to be cancelled: the runner looks at once."""

    def kept(self) -> Store:
        """The store. Raises UnavailableError where the server has none."""
        if self.store is None:
            raise UnavailableError(
                f"Nothing can be kept here. {self.store_problem}", retry_after=60.0
            )
        return self.store

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        """Around everything that happens to a request until the engine has taken it."""
        try:
            yield
        except HeadraceError as error:
            self.metrics.observe_rejected(str(error_body(error)["error"]["code"]))
            raise

    def check_admission(self) -> None:
        """Raises UnavailableError while draining."""
        if self.draining:
            raise UnavailableError(
                "The server is shutting down; send the request to another one, or try again soon.",
                retry_after=5.0,
            )


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
