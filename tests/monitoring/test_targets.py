"""The service discovery document for Prometheus."""

from __future__ import annotations

import json

from tests.route.scripted import Replica, ask, door_before, get

from headrace.route.targets import http_sd


def test_each_replica_is_one_target_with_its_application_and_model() -> None:
    addresses = {"chat": ["http://10.0.0.2:30001", "http://10.0.0.1:30000"], "idle": []}
    first, second = json.loads(http_sd(addresses, {"chat": "smollm2"}))
    assert [first["targets"], second["targets"]] == [["10.0.0.1:30000"], ["10.0.0.2:30001"]]
    assert first["labels"] == {
        "application": "chat",
        "replica": "10.0.0.1:30000",
        "model": "smollm2",
        "__scheme__": "http",
        "__metrics_path__": "/metrics",
    }


def test_the_order_of_sources_does_not_show() -> None:
    one = {"b": ["http://h:2", "http://h:1", "http://h:2"], "a": ["http://h:3"]}
    other = {"a": ["http://h:3"], "b": ["http://h:1", "http://h:2"]}
    assert http_sd(one) == http_sd(other)
    assert len(json.loads(http_sd(one))) == 3


def test_a_base_url_may_have_a_scheme_and_a_path() -> None:
    (target,) = json.loads(http_sd({"a": ["https://h:8443/chat/"]}))
    assert target["targets"] == ["h:8443"]
    assert target["labels"]["__scheme__"] == "https"
    assert target["labels"]["__metrics_path__"] == "/chat/metrics"
    assert "model" not in target["labels"]


def test_no_replicas_are_no_targets() -> None:
    assert json.loads(http_sd({})) == []


async def test_the_door_names_every_replica_it_knows() -> None:
    replica = Replica()
    async with door_before(replica) as (door, port):
        door.fleet.update("another source", {"sleepy": ["http://10.0.0.9:1"]})
        got = await ask(port, get("/targets"))
        assert got.status == 200 and got.headers["content-type"] == "application/json"
        assert {tuple(it["targets"]): it["labels"].get("model") for it in got.json} == {
            (replica.url.removeprefix("http://"),): "llama",
            ("10.0.0.9:1",): None,
        }
