"""Replicas that a name in DNS stands for. The resolver is a table that the tests change."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence

import pytest

from headrace.errors import ConfigError
from headrace.route.config import parse_config
from headrace.route.dns_source import DnsSource, addresses_of
from headrace.route.door import Door

Found = Mapping[str, Sequence[str]]


class Resolver:
    """host -> addresses, or the error that asking for it ends with."""

    def __init__(self, **known: Sequence[str] | int) -> None:
        self.known = dict(known)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        answer = self.known.get(host, socket.EAI_NONAME)
        if isinstance(answer, int):
            raise socket.gaierror(answer, "as the test wants it")
        return answer


class Watched:
    """A source at work, with what it has reported."""

    def __init__(self, services: dict[str, str], resolver: Resolver) -> None:
        self.reports: list[Found] = []
        self._news = asyncio.Event()
        source = DnsSource(lambda: services, resolve=resolver, every=0.001)
        self.task = asyncio.create_task(source.run(self._take))

    def _take(self, found: Found) -> None:
        self.reports.append(found)
        self._news.set()

    async def next(self) -> Found:
        async with asyncio.timeout(10):
            await self._news.wait()
        self._news.clear()
        return self.reports[-1]


async def test_every_address_of_a_service_is_a_replica() -> None:
    resolver = Resolver(pods=["10.0.0.2", "10.0.0.1", "10.0.0.2"], six=["fd00::7"])
    watched = Watched({"a": "http://pods:8000", "b": "http://six"}, resolver)
    assert await watched.next() == {
        "a": ("http://10.0.0.1:8000", "http://10.0.0.2:8000"),
        "b": ("http://[fd00::7]:80",),
    }
    resolver.known["pods"] = ["10.0.0.3"]
    assert (await watched.next())["a"] == ("http://10.0.0.3:8000",)
    await asyncio.sleep(0.02)
    assert len(watched.reports) == 2, "nothing has changed since"
    watched.task.cancel()


async def test_a_name_without_addresses_has_no_replicas() -> None:
    resolver = Resolver(pods=["10.0.0.1"])
    watched = Watched({"a": "http://pods:8000"}, resolver)
    await watched.next()
    del resolver.known["pods"]
    assert await watched.next() == {"a": ()}
    watched.task.cancel()


async def test_replicas_stay_while_no_resolver_answers() -> None:
    resolver = Resolver(pods=["10.0.0.1"], other=["10.0.1.1"])
    watched = Watched({"a": "http://pods:8000", "b": "http://other:8000"}, resolver)
    await watched.next()
    resolver.known |= {"pods": socket.EAI_AGAIN, "other": ["10.0.1.2"]}
    assert await watched.next() == {"a": ("http://10.0.0.1:8000",), "b": ("http://10.0.1.2:8000",)}
    watched.task.cancel()


async def test_services_may_come_and_go() -> None:
    services = {"a": "http://pods:8000"}
    watched = Watched(services, Resolver(pods=["10.0.0.1"], other=["10.0.1.1"]))
    await watched.next()
    services["b"] = "http://other:8000"
    assert (await watched.next())["b"] == ("http://10.0.1.1:8000",)
    del services["a"]
    assert await watched.next() == {"b": ("http://10.0.1.1:8000",)}
    watched.task.cancel()


async def test_the_system_s_resolver_is_asked() -> None:
    assert "127.0.0.1" in await addresses_of("127.0.0.1", 80)
    with pytest.raises(socket.gaierror) as failed:
        await addresses_of("no.such.host.invalid", 80)
    assert failed.value.errno in (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_AGAIN)


async def test_the_door_has_the_replicas_of_its_services() -> None:
    config = parse_config({"models": {"m": {"service": "http://127.0.0.1:9"}}}, origin="test")
    door = Door(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await door.start(listener)
        try:
            async with asyncio.timeout(10):
                while "m" not in door.fleet.applications:
                    await asyncio.sleep(0.01)
            assert [it.url for it in door.fleet.applications["m"]] == ["http://127.0.0.1:9"]
        finally:
            await door.close()


@pytest.mark.parametrize(
    "backend",
    [
        {},
        {"service": "http://a:1", "replicas": ["http://b:1"]},
        {"service": "http://a:1", "application": "a"},
    ],
)
def test_a_backend_is_told_in_one_way(backend: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="needs one of"):
        parse_config({"models": {"m": backend}}, origin="test")


def test_a_service_is_a_url_of_a_server() -> None:
    with pytest.raises(ConfigError, match="must be http://HOST:PORT"):
        parse_config({"models": {"m": {"service": "headrace:8000/v1"}}}, origin="test")
