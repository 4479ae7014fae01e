"""The door's addresses from Ray: merging, Serve's REST answer, a process that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError
from headrace.route.ray_source import (
    NAMESPACE,
    REGISTRY,
    RegistrySource,
    ServeRestSource,
    addresses_in,
    merge,
    ray_source,
)

LEASE = 10.0


def snapshot(*replicas: tuple[str, str], age: float = 100.0) -> dict[str, Any]:
    entries = [{"application": a, "url": u, "version": "other"} for a, u in replicas]
    return {"epoch": "x", "revision": 1, "age_s": age, "lease_s": LEASE, "replicas": entries}


def test_the_actor_has_one_name() -> None:
    from headrace.deploy import registry

    assert (REGISTRY, NAMESPACE) == (registry.NAME, registry.NAMESPACE)


def test_addresses_are_by_application_and_in_order() -> None:
    found = merge({}, snapshot(("b", "http://2"), ("a", "http://1"), ("b", "http://1")))
    assert found == {"a": ("http://1",), "b": ("http://1", "http://2")}
    assert merge(found, snapshot(("b", "http://2"))) == {"b": ("http://2",)}


def test_a_registry_that_has_just_begun_takes_nothing_away() -> None:
    known = {"a": ("http://1",), "b": ("http://2",)}
    young = snapshot(("b", "http://3"), age=LEASE - 1)
    assert merge(known, young) == {"a": ("http://1",), "b": ("http://2", "http://3")}
    assert merge(known, snapshot(("b", "http://3"), age=LEASE)) == {"b": ("http://3",)}


def target(name: str, port: int) -> dict[str, Any]:
    return {"ip": "10.0.0.1", "port": port, "instance_id": "", "name": name}


def details(*groups: dict[str, Any], status: str = "RUNNING") -> dict[str, Any]:
    return {
        "proxies": {"node": {"actor_name": "proxy-1"}},
        "applications": {"chat": {"status": status}},
        "target_groups": list(groups),
    }


def group(app: str, *targets: dict[str, Any], protocol: str = "HTTP") -> dict[str, Any]:
    return {"protocol": protocol, "app_name": app, "route_prefix": "/", "targets": list(targets)}


def test_serves_target_groups_are_replicas_but_for_proxies_that_stand_in() -> None:
    answer = details(
        group("chat", target("r1", 30001), target("r0", 30000)),
        group("chat", target("r0", 40000), protocol="gRPC"),
        group("empty", target("proxy-1", 8000)),
    )
    assert addresses_in(answer) == {
        "chat": ("http://10.0.0.1:30000", "http://10.0.0.1:30001"),
        "empty": (),
    }


def test_proxies_alone_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"Give ray\.address instead"):
        addresses_in(details(group("", target("proxy-1", 8000))))
    assert addresses_in(details(group("", target("proxy-1", 8000)), status="DEPLOYING")) == {}
    assert addresses_in({}) == {}


def test_the_reference_tells_which_source_it_is() -> None:
    assert isinstance(ray_source("http://head:8265"), ServeRestSource)
    assert isinstance(ray_source("ray://head:10001"), RegistrySource)


CHILD = """
import json, pathlib, sys
lines = {lines!r}
for line in lines:
    print(line, flush=True)
pathlib.Path({told!r}).write_text(sys.stdin.readline() + sys.stdin.readline())
print("the head is gone", file=sys.stderr)
"""


def test_what_is_known_outlives_the_process_that_told_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = tmp_path / "told"
    lines = ["no JSON", json.dumps(snapshot(("chat", "http://1"))), json.dumps(snapshot())]
    program = CHILD.format(lines=lines[:2], told=str(told))
    source = RegistrySource("unused", command=[sys.executable, "-c", program])
    changes: list[Any] = []

    async def scenario() -> None:
        running = asyncio.create_task(source.run(changes.append))
        while not changes:
            await asyncio.sleep(0.01)
        source.report_demand({"chat": 3})
        while "the head is gone" not in caplog.text:
            await asyncio.sleep(0.01)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert changes == [{"chat": ("http://1",)}]
    assert [json.loads(line) for line in told.read_text().splitlines()] == [{}, {"chat": 3}]
    assert "is Headrace other, this door is" in caplog.text
