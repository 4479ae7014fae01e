"""Rollouts, scaling and deaths on a real cluster of several logical nodes, with requests counted.

The tests share a cluster and run in this order; each leaves two replicas running.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from tests.deploy.cluster_of_nodes import Load, Nodes, cluster_of_nodes, door_to

from headrace.route.ray_source import RegistrySource

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

WaitUntil = Callable[[Callable[[], object], str], None]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with cluster_of_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        assert nodes.deploy() == 0
        yield nodes


@pytest.fixture(scope="module")
def door(nodes: Nodes) -> Iterator[str]:
    with door_to(nodes) as url:
        yield url


def addresses(
    nodes: Nodes, enough: Callable[[Mapping[str, Sequence[str]]], bool]
) -> Mapping[str, Sequence[str]]:
    """What a door hears from the registry, once it is `enough`."""

    async def listen() -> Mapping[str, Sequence[str]]:
        heard: asyncio.Queue[Mapping[str, Sequence[str]]] = asyncio.Queue()
        running = asyncio.create_task(RegistrySource(nodes.address).run(heard.put_nowait))
        try:
            while not enough(found := await heard.get()):
                pass
            return found
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    return asyncio.run(asyncio.wait_for(listen(), 60))


def two(found: Mapping[str, Sequence[str]]) -> bool:
    return len(found.get("chat", ())) == 2


def assert_nothing_lost(load: Load, at_least: int) -> None:
    assert set(load.outcomes) == {"complete"}, f"{load.outcomes}: {load.errors}"
    assert load.outcomes["complete"] >= at_least


def assert_only_in_flight(load: Load, dead: int = 1) -> None:
    """At most what each worker had under way at a replica that died was lost, and its client was
    told."""
    assert load.outcomes["silent"] == 0, load.errors
    assert load.outcomes["error"] <= load.workers * dead, load.errors
    assert load.outcomes["complete"] > 0


def test_a_door_learns_each_replicas_own_port(nodes: Nodes) -> None:
    urls = addresses(nodes, two)["chat"]
    for url in urls:
        assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
        assert "headrace_" in httpx.get(f"{url}/metrics").text
    assert len(urls) == len({httpx.get(f"{url}/metrics").text for url in urls})


def test_the_same_file_again_changes_nothing(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {replica["pid"] for replica in nodes.replicas()}
    assert nodes.deploy() == 0
    assert {replica["pid"] for replica in nodes.replicas()} == before
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("replicas", "args", "status", "message"),
    [
        (2, {"options": {"threads": 9}}, 2, "a replica needs 9 CPU, and the most that a node has"),
        (9, {}, 2, "9 replicas are asked for, and the cluster has room for 4"),
        (2, {"options": {"thread": 1}}, 2, "did you mean 'threads'"),
        (2, {"model": "/none.gguf"}, 2, "/none.gguf does not exist on any node"),
        (2, {"model": "BROKEN"}, 1, "broken.gguf: .* What served before goes on .2 running."),
    ],
)
def test_a_bad_version_is_a_named_error_and_the_old_one_serves(
    nodes: Nodes,
    capsys: pytest.CaptureFixture[str],
    replicas: int,
    args: dict[str, Any],
    status: int,
    message: str,
) -> None:
    broken = nodes.folder / "broken.gguf"
    broken.write_bytes(b"GGUF")
    if args.get("model") == "BROKEN":
        args = {"model": str(broken)}
    before = {replica["pid"] for replica in nodes.replicas()}
    with Load(nodes.url, workers=2) as load:
        assert nodes.deploy(replicas, **args) == status
        load.until(4)
    assert re.search(message, capsys.readouterr().err)
    assert_nothing_lost(load, 4)
    assert {replica["pid"] for replica in nodes.replicas()} == before


def test_a_rollout_loses_nothing(nodes: Nodes, door: str) -> None:
    before = {replica["pid"] for replica in nodes.replicas()}
    with Load(nodes.url) as straight, Load(door) as through:
        through.until(4)
        assert nodes.deploy(options={"max_model_len": 1000}) == 0
        through.until(4)
        straight.until(4)
    assert_nothing_lost(straight, 4)
    assert_nothing_lost(through, 8)
    assert not before & {replica["pid"] for replica in nodes.replicas()}


def test_scaling_loses_nothing(nodes: Nodes, door: str, wait_until: WaitUntil) -> None:
    options = {"max_model_len": 1000}
    with Load(nodes.url, max_tokens=100) as straight, Load(door, max_tokens=100) as through:
        through.until(4)
        for replicas in (1, 3, 2):
            assert nodes.deploy(replicas, options=options) == 0
            wait_until(partial(nodes.has, replicas), f"{replicas} replicas")
            straight.until(4)
            through.until(4)
    assert_nothing_lost(straight, 12)
    assert_nothing_lost(through, 16)


def test_a_killed_replica_loses_what_haproxy_had_there_and_through_the_door_nothing(
    nodes: Nodes, door: str, wait_until: WaitUntil
) -> None:
    before = {replica["pid"] for replica in nodes.replicas()}
    with Load(nodes.url, max_tokens=100) as straight, Load(door, max_tokens=100) as through:
        through.until(4)
        psutil.Process(min(before)).kill()
        wait_until(
            lambda: len({r["pid"] for r in nodes.replicas()} - {min(before)}) == 2,
            "another replica runs",
        )
        straight.until(4)
        through.until(4)
    assert_only_in_flight(straight)
    assert_nothing_lost(through, 8)


def test_a_killed_registry_is_there_again(nodes: Nodes) -> None:
    known = addresses(nodes, two)
    nodes.actor("RegistryActor").kill()
    assert addresses(nodes, two) == known


def test_a_killed_node_loses_what_haproxy_had_there_and_through_the_door_nothing(
    nodes: Nodes, door: str, wait_until: WaitUntil
) -> None:
    node_id = nodes.replicas()[0]["node_id"]
    (victim,) = [node for node in nodes.workers if node.node_id == node_id]
    nodes.workers.remove(victim)
    dead = sum(replica["node_id"] == node_id for replica in nodes.replicas())
    with Load(nodes.url, max_tokens=100) as straight, Load(door, max_tokens=100) as through:
        through.until(4)
        nodes.cluster.remove_node(victim, allow_graceful=False)

        def recovered() -> bool:
            replicas = nodes.replicas()
            return len(replicas) == 2 and all(r["node_id"] != victim.node_id for r in replicas)

        wait_until(recovered, "the other node has both replicas")
        straight.until(4)
        through.until(4)
    assert_only_in_flight(straight, dead)
    assert_nothing_lost(through, 8)
    assert two(addresses(nodes, two))


def test_a_door_knows_its_replicas_after_the_head_has_gone(nodes: Nodes) -> None:
    async def scenario() -> None:
        changes: list[Mapping[str, Sequence[str]]] = []
        running = asyncio.create_task(RegistrySource(nodes.address).run(changes.append))
        while not (changes and two(changes[-1])):
            await asyncio.sleep(0.1)
        nodes.cluster.head_node.kill_gcs_server(check_alive=False)
        told = len(changes)
        await asyncio.sleep(10)
        assert len(changes) == told
        for url in changes[-1]["chat"]:
            assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(asyncio.wait_for(scenario(), 90))
