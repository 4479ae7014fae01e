"""The registry without Ray: leases, changes, demand, and readers that wait."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from headrace.deploy.registry import LEASE_SECONDS, Registration, Registry, RegistryActor


def entry(replica: str = "a", **more: str) -> dict[str, str]:
    values = dict.fromkeys(Registration.__dataclass_fields__, "x")
    return asdict(Registration(**{**values, "replica": replica, **more}))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def replicas(snapshot: dict[str, Any]) -> list[str]:
    return [found["replica"] for found in snapshot["replicas"]]


def test_an_entry_lives_as_long_as_it_is_renewed() -> None:
    clock = Clock()
    registry = Registry(clock)
    registry.register(entry("a"))
    registry.register(entry("b"))
    clock.now = LEASE_SECONDS * 0.8
    registry.register(entry("b"))
    clock.now = LEASE_SECONDS * 1.2
    assert replicas(registry.snapshot()) == ["b"]
    registry.unregister("b")
    registry.unregister("never there")
    assert replicas(registry.snapshot()) == []


def test_the_revision_counts_changes_not_renewals() -> None:
    registry = Registry(Clock())
    registry.register(entry("a"))
    before = registry.snapshot()
    registry.register(entry("a"))
    assert registry.snapshot() == before
    registry.register(entry("a", url="http://other"))
    assert registry.snapshot()["revision"] == before["revision"] + 1
    assert Registry(Clock()).snapshot()["epoch"] != before["epoch"]


def test_demand_is_the_sum_over_doors_that_are_alive() -> None:
    clock = Clock()
    registry = Registry(clock)
    registry.report_demand("one", "1.0", {"chat": 3, "embed": 0})
    clock.now = LEASE_SECONDS * 0.8
    registry.report_demand("two", "1.1", {"chat": 2})
    assert registry.demand() == {"chat": 5}
    registry.report_demand("two", "1.1", {"chat": 1})
    assert registry.demand() == {"chat": 4}
    assert registry.doors() == {"one": "1.0", "two": "1.1"}
    clock.now = LEASE_SECONDS * 1.2
    assert registry.demand() == {"chat": 1}
    assert registry.doors() == {"two": "1.1"}


def test_who_watches_hears_of_a_change_at_once_and_of_none_at_the_end() -> None:
    async def scenario() -> None:
        registry = RegistryActor()
        first = await registry.watch("", 0, 10)
        known = (first["epoch"], first["revision"])
        assert await registry.watch(*known, 0.02) | {"age_s": 0} == first | {"age_s": 0}
        waiting = asyncio.create_task(registry.watch(*known, 60))
        await asyncio.sleep(0)
        registry.register(entry("a"))
        assert replicas(await asyncio.wait_for(waiting, 0.5)) == ["a"]

    asyncio.run(scenario())
