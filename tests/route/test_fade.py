"""What a door sent a minute ago weighs half: each report of a replica lets it fade."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headrace.route import fleet
from headrace.route.choose import RECENT_HALF_LIFE_S
from headrace.route.fleet import Replica


async def test_what_was_sent_fades_with_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica("http://127.0.0.1:9")

    async def fetch(path: str, api_key: str | None) -> tuple[int, bytes]:
        body = b'{"version": 1, "ready": true}' if path == "/load" else b'{"data": []}'
        return 200, body

    monkeypatch.setattr(replica, "fetch", fetch)
    replica.view.recent = 8.0
    now = replica.last_answer
    # The name in that module, not the clock itself: event loops in other threads sleep by it.
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: now))
    for polls in (1, 2):
        now += RECENT_HALF_LIFE_S
        await replica.poll(None)
        assert replica.view.recent == pytest.approx(8.0 / 2**polls)
