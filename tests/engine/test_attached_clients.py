"""Several clients of one engine: what each is told, and what is left when one goes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from headrace.engine import attached_clients
from headrace.engine.attached_clients import AttachedClient, AttachedClients
from headrace.engine.channel import BlockingChannel, FrameReader, frame, socket_pair
from headrace.engine.client import (
    EngineStats,
    FinishReason,
    ModelInfo,
    RequestOutput,
    StepOutputs,
)
from headrace.engine.process import EngineProcess
from headrace.engine.wire import Abort, FromEngine, ResetPrefixCache, Submit
from headrace.sampling_params import GenerateRequest, SamplingParams

INFO = ModelInfo(
    max_model_len=64,
    vocab_size=10,
    eos_token_ids=[],
    num_blocks=1,
    block_size=1,
    max_num_seqs=1,
    dtype="float32",
    device="cpu",
    weight_bytes=0,
    kv_cache_bytes=0,
    load_seconds=0.0,
    kernels={},
)


class FakeEngine:
    """A token for each request at each step: the number of requests there are."""

    def __init__(self) -> None:
        self.info = INFO
        self.live: dict[str, int] = {}
        self.aborted: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.aborted)

    def idle(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.live))

    def add(self, request: GenerateRequest, handle: int) -> None:
        self.live[request.request_id] = handle

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def reset_prefix_cache(self) -> bool:
        return not self.live

    def step(self) -> StepOutputs:
        for request_id in self.aborted:
            self.live.pop(request_id, None)
        self.aborted.clear()
        handles = list(self.live.values())
        return StepOutputs(handles, [len(handles)] * len(handles), [], self.stats())


class Client:
    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.socket.settimeout(5)
        self._reader = FrameReader()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def send(self, message: Submit | Abort | ResetPrefixCache) -> None:
        self.socket.sendall(frame(msgspec.msgpack.encode(message)))

    def submit(self, request_id: str, handle: int) -> None:
        request = GenerateRequest(
            request_id=request_id, prompt_token_ids=[1], sampling=SamplingParams()
        )
        self.send(Submit(request, handle))

    def heard(self) -> list[str]:
        """What came since: "name", and for steps "step{handle: token}"."""
        self.socket.setblocking(False)
        found = []
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return []
        for message in map(self._decoder.decode, self._reader.feed(data)):
            name = type(message).__name__
            if (outputs := getattr(message, "outputs", None)) is not None:
                assert outputs.stats is not None
                name = f"step{dict(zip(outputs.handles, outputs.token_ids, strict=True))}"
            found.append(name)
        return found


@dataclass
class House:
    """An engine process without its process: `turn` is one pass of its loop."""

    process: EngineProcess
    attached: AttachedClients
    engine: FakeEngine
    first: Client
    path: Path

    def turn(self) -> None:
        self.process._receive(self.engine, wait=False)  # type: ignore[arg-type]
        if self.engine.has_work:
            self.process._deliver(self.engine.step())
        self.process._attend(self.engine, self.attached)  # type: ignore[arg-type]

    def connect(self) -> Client:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(self.path))
        self.turn()
        return Client(end)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    path = tmp_path / "engine"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    ours, theirs = socket_pair()
    channel = BlockingChannel(theirs)
    attached = AttachedClients(listener, channel)
    yield House(EngineProcess(channel, attached), attached, FakeEngine(), Client(ours), path)
    for end in (listener, ours, theirs):
        end.close()


def test_each_client_gets_its_own_tokens_and_the_first_hears_of_every_step(house: House) -> None:
    one, two = house.connect(), house.connect()
    for client in (one, two):
        assert client.heard() == ["Hello", "Heartbeat", "Ready"]
    one.submit("a", 1)
    two.submit("b", 1)
    two.submit("c", 7)
    house.turn()
    assert one.heard() == ["step{1: 3}"]
    assert two.heard() == ["step{1: 3, 7: 3}"]
    assert house.first.heard() == ["step{}"]
    one.send(ResetPrefixCache())
    house.turn()
    assert "PrefixCacheReset" in one.heard() and "PrefixCacheReset" not in two.heard()


def test_requests_end_with_their_client_and_may_come_again(house: House) -> None:
    one, two = house.connect(), house.connect()
    one.submit("a", 1)
    two.submit("b", 1)
    house.turn()
    one.socket.close()
    again = socket.socket(socket.AF_UNIX)
    again.connect(str(house.path))
    successor = Client(again)
    successor.submit("a", 1)  # there before the engine knows that the other one is gone
    house.turn()
    assert list(house.engine.live) == ["b"]
    house.turn()
    assert sorted(house.engine.live) == ["a", "b"]
    house.turn()
    two.heard()
    house.turn()
    assert two.heard() == ["step{1: 2}"]
    assert successor.heard()[-1] == "step{1: 2}"


def test_the_end_of_a_request_frees_its_id(house: House) -> None:
    one = house.connect()
    one.submit("a", 1)
    house.turn()
    (client,) = house.attached
    assert client.request_ids == {"a"}
    end = RequestOutput(request_id="a", finish_reason=FinishReason.LENGTH)
    ((owner, part),) = house.attached.split(StepOutputs([], [], [end], EngineStats()))
    assert owner is client and part.details == [end]
    assert client.request_ids == set()


def test_a_client_that_does_not_read_is_waited_for_and_then_dropped(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = house.connect(), house.connect()
    silent.submit("a", 1)
    other.submit("b", 1)
    house.turn()
    (client, _) = house.attached
    while not client.unsent:
        assert client.send(bytes(100_000))
    assert not client.send(bytes(attached_clients.MAX_UNSENT_BYTES))
    monkeypatch.setattr(AttachedClient, "send", lambda self, message: self is not client)
    house.turn()
    house.turn()
    assert client not in house.attached and list(house.engine.live) == ["b"]
