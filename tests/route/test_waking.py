"""Requests that wait for a replica: how many, how long, and what they and the scaler are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.route.scripted import PATIENCE, TEXT, WHOLE, Replica, ask, get, post

from headrace.errors import UnavailableError
from headrace.listening import listen
from headrace.route import waking
from headrace.route.config import parse_config
from headrace.route.door import Door
from headrace.route.waking import WaitingRoom, Waking


def wake(queue: int = 10, deadline_s: float = 60.0) -> Any:
    return SimpleNamespace(queue=queue, deadline_s=deadline_s)


def test_a_room_takes_so_many_and_lets_them_out_in_order() -> None:
    room = WaitingRoom()
    tickets = [room.enter(0.0, 3) for _ in range(4)]
    assert tickets[3] is None
    assert room.open(5.0) == tickets[:3]
    assert len(room) == 0
    assert room.enter(6.0, 3) is not None


def test_those_who_left_take_no_place() -> None:
    room = WaitingRoom()
    first, second = room.enter(0.0, 2), room.enter(5.0, 2)
    assert first is not None
    assert room.leave(first)
    assert not room.leave(first)
    assert room.enter(10.0, 2) is not None
    assert room.open(10.0) == [second, 3]


def test_it_expects_what_it_has_seen() -> None:
    room = WaitingRoom()
    assert room.retry_after(0.0, 120.0) == 120.0
    room.enter(0.0, 5)
    room.enter(7.0, 5)
    room.open(20.0)
    assert room.retry_after(30.0, 120.0) == 20.0
    room.enter(100.0, 5)
    assert room.retry_after(115.0, 120.0) == 5.0
    assert room.retry_after(500.0, 120.0) == 1.0
    room.open(110.0)
    assert 10.0 < room.retry_after(200.0, 120.0) < 20.0


class Room(RuleBasedStateMachine):
    """Against a list of tickets."""

    def __init__(self) -> None:
        super().__init__()
        self.room, self.now = WaitingRoom(), 0.0
        self.model: list[int] = []

    @rule(size=st.integers(0, 4), seconds=st.integers(0, 5))
    def enter(self, size: int, seconds: int) -> None:
        self.now += seconds
        ticket = self.room.enter(self.now, size)
        assert (ticket is None) == (len(self.model) >= size)
        if ticket is not None:
            assert all(ticket > other for other in self.model)
            self.model.append(ticket)

    @rule(index=st.integers(0, 3))
    def leave(self, index: int) -> None:
        if index < len(self.model):
            assert self.room.leave(self.model.pop(index))

    @rule()
    def open(self) -> None:
        assert self.room.open(self.now) == self.model
        self.model = []

    @invariant()
    def agrees(self) -> None:
        assert len(self.room) == len(self.model)
        assert self.room.retry_after(self.now, 9.0) >= 1.0


TestRoom = Room.TestCase
TestRoom.settings = settings(max_examples=30, stateful_step_count=20)


class Site:
    """A Waking, what it reported, and how its requests ended."""

    def __init__(self, **wakes: Any) -> None:
        self.reports: list[Mapping[str, int]] = []
        self.outcomes: list[tuple[str, str]] = []
        self.waking = Waking(
            lambda: wakes,
            self.reports.append,
            lambda application, outcome: self.outcomes.append((application, outcome)),
        )

    async def begin(self, application: str) -> asyncio.Task[bool]:
        task = asyncio.create_task(self.waking.wait(application))
        await asyncio.sleep(0)
        return task


async def test_requests_wait_for_their_own_application() -> None:
    site = Site(chat=wake(), code=wake())
    tasks = [await site.begin(name) for name in ("chat", "chat", "code")]
    assert site.waking.queued == {"chat": 2, "code": 1}
    assert site.reports[-1] == {"chat": 2, "code": 1}
    site.waking.on_up("chat")
    assert [await task for task in tasks[:2]] == [True, True]
    assert not tasks[2].done()
    assert site.reports[-1] == {"chat": 0, "code": 1}
    site.waking.on_up("code")
    assert await tasks[2]
    site.waking.on_up("code")  # nobody waits
    assert site.outcomes == [("chat", "ready"), ("chat", "ready"), ("code", "ready")]


async def test_an_application_that_does_not_sleep_is_not_waited_for() -> None:
    site = Site(chat=wake())
    assert await site.waking.wait("other") is False
    assert site.reports == []


async def test_one_too_many_is_told_when_to_come_back() -> None:
    site = Site(chat=wake(queue=1, deadline_s=45.0))
    first = await site.begin("chat")
    with pytest.raises(UnavailableError, match="1 requests wait") as caught:
        await site.waking.wait("chat")
    assert caught.value.retry_after == 45.0
    site.waking.on_up("chat")
    assert await first
    assert site.outcomes == [("chat", "full"), ("chat", "ready")]


async def test_one_that_waited_too_long_is_told_so() -> None:
    site = Site(chat=wake(deadline_s=0.02))
    with pytest.raises(UnavailableError, match=r"within 0\.02 s"):
        await site.waking.wait("chat")
    assert site.reports[-1] == {"chat": 0}
    assert site.outcomes == [("chat", "late")]


async def test_a_client_that_leaves_gives_its_place_up() -> None:
    site = Site(chat=wake(queue=1))
    task = await site.begin("chat")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert site.reports[-1] == {"chat": 0}
    assert site.outcomes == [("chat", "gone")]
    again = await site.begin("chat")
    site.waking.on_up("chat")
    assert await again


# ---- at a door -----------------------------------------------------------------------------------

CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}


@contextlib.asynccontextmanager
async def sleepy_door(
    reports: list[Mapping[str, int]], **limits: float
) -> AsyncIterator[tuple[Door, int]]:
    """A door whose model `llama` is the application `chat`, which has no replica."""
    content = {"models": {"llama": {"application": "chat", "wake": limits}}}
    door = Door(parse_config(content, origin="test"), metric_families=waking.FAMILIES)
    waking.attach(door, reports.append)
    listener = listen("127.0.0.1", 0)
    await door.start(listener)
    try:
        yield door, listener.getsockname()[1]
    finally:
        await door.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_go_out_when_the_first_replica_is_ready() -> None:
    reports: list[Mapping[str, int]] = []
    replica = Replica()
    await replica.start()
    async with sleepy_door(reports, queue=3) as (door, port):
        bodies = (CHAT, {**CHAT, "stream": True}, CHAT)
        waiting = [asyncio.create_task(ask(port, post(body))) for body in bodies]
        await until(lambda: reports and reports[-1] == {"chat": 3})
        assert (await ask(port, get("/readyz"))).json["models"] == {"llama": "asleep"}
        told = (await ask(port, get("/metrics"))).body.decode()
        assert 'headrace_door_queued_requests{model_name="llama"} 3.0' in told
        assert not any(task.done() for task in waiting)
        door.fleet.update("test", {"chat": [replica.url]})
        answers = [await task for task in waiting]
        assert [it.status for it in answers] == [200, 200, 200]
        assert answers[0].json["choices"][0]["message"]["content"] == TEXT
        assert answers[1].body == WHOLE
        assert reports[-1] == {"chat": 0}
        told = (await ask(port, get("/metrics"))).body.decode()
        name = "headrace_door_unqueued_requests_total"
        assert f'{name}{{model_name="llama",outcome="ready"}} 3.0' in told
    replica.kill()


async def test_one_too_many_and_one_too_late_get_503_and_a_time_to_come_back() -> None:
    reports: list[Mapping[str, int]] = []
    async with sleepy_door(reports, queue=1, deadline_s=0.5) as (_, port):
        late = asyncio.create_task(ask(port, post(CHAT)))
        await until(lambda: reports)
        for answer in (await ask(port, post(CHAT)), await late):
            assert answer.status == 503
            assert answer.json["error"]["code"] == "unavailable"
            assert answer.headers["retry-after"] == "1"


async def test_a_client_that_hangs_up_is_not_waited_for() -> None:
    reports: list[Mapping[str, int]] = []
    async with sleepy_door(reports, queue=1) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(CHAT))
        await until(lambda: reports and reports[-1] == {"chat": 1})
        writer.close()
        await until(lambda: reports[-1] == {"chat": 0})
