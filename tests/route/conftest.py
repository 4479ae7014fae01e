"""The door's tests run on the event loop that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from headrace.route import fleet


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]] | None:
    here = Path(__file__).parent in item.path.parents
    return {"uvloop": uvloop.new_event_loop} if here else None


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.05)
