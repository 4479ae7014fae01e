"""Shadow traffic: a share of requests is sent to a second application, too, and its answers are
compared. Clients get nothing of it and never wait for it.

A mirrored request is sent once the client's answer is under way, with the seed that drew it. Few
run at a time; where replicas are busy, none does.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec

from headrace.observability.families import Family
from headrace.route.asked import Asked, Kind, with_model
from headrace.route.fleet import Fleet, Replica
from headrace.route.http_text import Headers, relayed, request_head
from headrace.route.metrics import DoorMetrics
from headrace.route.relay import Client
from headrace.route.upstream import Fetched

logger = logging.getLogger(__name__)

MIRRORED = frozenset(("/v1/chat/completions", "/v1/completions"))
"""What generates, keeps nothing, and can be compared."""
MAX_RUNNING = 16
"""Mirrored requests of one door process at a time; those beyond are dropped."""
MAX_ANSWER = 1 << 20
"""Bytes of an answer; longer ones are not compared."""
SECONDS = 600.0

_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_MODEL = ("model_name",)
OUTCOMES = ("equal", "text", "finish_reason", "status", "failed", "too_long", "dropped", "left")
FAMILIES: tuple[Family, ...] = (
    Family(
        "door_shadow_requests_total",
        "counter",
        "Mirrored requests: the answers were equal or differed in status, text or finish_reason; "
        "the shadow failed; they were too long to compare; dropped under load; the client left.",
        ("model_name", "outcome"),
    ),
    Family(
        "door_shadow_seconds_ratio",
        "histogram",
        "Time of a shadow's answer as a part of the client's.",
        _MODEL,
        _RATIOS,
    ),
    Family(
        "door_shadow_first_byte_ratio",
        "histogram",
        "Time to the first byte of a shadow's answer as a part of the client's.",
        _MODEL,
        _RATIOS,
    ),
    Family(
        "door_shadow_length_ratio",
        "histogram",
        "Characters of a shadow's answer as a part of the client's.",
        _MODEL,
        _RATIOS,
    ),
)

_SEED = re.compile(rb'(?i)\r\nheadrace-sampling: [^\r]*"seed":(-?\d{1,19})[,}]')
_REFUSED = re.compile(rb"HTTP/1.1 (?:5|429)")
"""Answers of clients that ask for no more load."""
_HEADERS = frozenset((b"content-length", b"expect", b"headrace-journal", b"x-request-id"))


class Shadows:
    """The mirrored requests of one door."""

    def __init__(self, fleet: Fleet, metrics: DoorMetrics) -> None:
        self._fleet = fleet
        self._count = metrics.family("door_shadow_requests_total").labels
        self._seconds = metrics.family("door_shadow_seconds_ratio").labels
        self._first_byte = metrics.family("door_shadow_first_byte_ratio").labels
        self._length = metrics.family("door_shadow_length_ratio").labels
        self.running: set[asyncio.Task[None]] = set()

    def mirror(self, asked: Asked, client: Client, *, model: str, main: str, shadow: str) -> Mirror:
        """To be put between the answer and `client`. `main`: the model's own application."""
        return Mirror(self, asked, client, model, main, shadow)

    @staticmethod
    def takes(asked: Asked) -> bool:
        """Whether such a request can be mirrored."""
        return asked.kind is Kind.MODEL and asked.method == b"POST" and asked.path in MIRRORED

    def start(self, mirror: Mirror, seed: int | None) -> None:
        """The client's answer is under way."""
        replica = self._replica(mirror)
        if replica is None or len(self.running) >= MAX_RUNNING:
            mirror.forget()
            self._tell(mirror, "dropped")
            return
        mirror.task = task = asyncio.create_task(self._run(mirror, replica, seed))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    def _replica(self, mirror: Mirror) -> Replica | None:
        """None where requests of clients wait: at the shadow, or at all replicas that they go to,
        which may share its hardware."""
        main = self._fleet.usable(mirror.main)
        if main and all(it.view.load.queued for it in main):
            return None
        replica = self._fleet.pick(mirror.shadow, mirror.asked.route_request())
        return None if replica is None or replica.view.load.queued else replica

    async def _run(self, mirror: Mirror, replica: Replica, seed: int | None) -> None:
        replica.view.in_flight += 1
        try:
            async with asyncio.timeout(SECONDS):
                theirs = await _ask(mirror.asked, replica, seed)
                ours = await mirror.ended
            self._compare(mirror, ours, theirs)
        except asyncio.CancelledError:
            self._tell(mirror, "left")
            raise
        except (OSError, TimeoutError):
            self._tell(mirror, "failed")
        except Exception:
            logger.exception("A shadow's answer cannot be compared")
            self._tell(mirror, "failed")
        finally:
            replica.view.in_flight -= 1

    def _compare(self, mirror: Mirror, ours: Told, theirs: Told) -> None:
        outcome = difference(ours, theirs)
        self._tell(mirror, outcome)
        if outcome in ("status", "failed", "too_long") or theirs.status != 200:
            return
        ratios: tuple[tuple[Any, float, float], ...] = (
            (self._seconds, theirs.seconds, ours.seconds),
            (self._first_byte, theirs.first_byte, ours.first_byte),
            (self._length, float(theirs.length), float(ours.length)),
        )
        for family, shadow, client in ratios:
            if client > 0:
                family(mirror.model).observe(shadow / client)

    def _tell(self, mirror: Mirror, outcome: str) -> None:
        self._count(mirror.model, outcome).inc()


class Mirror:
    """A Client that looks on at what another one is sent."""

    def __init__(
        self,
        shadows: Shadows,
        asked: Asked,
        client: Client,
        model: str,
        main: str,
        shadow: str,
    ) -> None:
        self.asked, self.model, self.main, self.shadow = asked, model, main, shadow
        self.ended: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self._shadows, self._client = shadows, client
        self._began = time.perf_counter()
        self._first_byte = 0.0
        self._pieces: list[bytes] | None = []
        self._size = 0

    def write(self, data: bytes) -> None:
        self._client.write(data)
        if not self._first_byte:
            self._first_byte = time.perf_counter() - self._began
            if _REFUSED.match(data):
                self.forget()
                return
            seed = _SEED.search(data)
            self._shadows.start(self, int(seed[1]) if seed else None)
        if self._pieces is not None:
            self._pieces.append(data)
            self._size += len(data)
            if self._size > MAX_ANSWER:
                self._pieces = []

    def end(self, *, keep_alive: bool) -> None:
        self._client.end(keep_alive=keep_alive)
        if self._pieces is not None and not self.ended.done():
            data = b"" if self._size > MAX_ANSWER else b"".join(self._pieces)
            told = Told(
                seconds=time.perf_counter() - self._began,
                first_byte=self._first_byte,
                raw=data,
                whole=self._size <= MAX_ANSWER,
            )
            self.ended.set_result(told)

    def cut(self) -> None:
        self._client.cut()
        self.leave()

    def leave(self) -> None:
        """The client's answer has ended. Where it is not complete there is nothing to compare."""
        if self.task is not None and not self.ended.done():
            self.task.cancel()
        self.forget()

    def forget(self) -> None:
        """What the client is sent is of no interest any more."""
        self._pieces = None


# --- the shadow's answer ------------------------------------------------------------------------


@dataclass(slots=True)
class Told:
    """One answer, to be compared."""

    seconds: float
    first_byte: float
    raw: bytes = b""
    """As it came over HTTP, head and all; of a shadow's answer only the body."""
    whole: bool = True
    status: int = 0
    length: int = 0
    """Characters of all choices."""
    choices: dict[int, Said] = field(default_factory=dict)


@dataclass(slots=True)
class Said:
    """What one choice said: its text, calls included, and how it ended."""

    text: str = ""
    finish_reason: str | None = None


class _Watch(Fetched):
    """The answer of a shadow, with its times."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.first_byte = 0.0
        self.size = 0

    def on_head(self, status: int, headers: Headers, length: int | None) -> None:
        self.first_byte = time.perf_counter() - self.began
        super().on_head(status, headers, length)

    def on_body(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= MAX_ANSWER:
            super().on_body(data)


async def _ask(asked: Asked, replica: Replica, seed: int | None) -> Told:
    """Raises OSError."""
    connection = await replica.pool.connect(fresh=True)
    body = _mirrored_body(asked, replica, seed)
    headers = relayed(asked.headers, without=_HEADERS)
    headers.append((b"x-request-id", b"shadow-" + asked.request_id.encode("latin-1")))
    answer = _Watch()
    connection.send(request_head(b"POST", asked.url, headers, len(body)) + body, answer)
    try:
        status, _, got = await answer
    except asyncio.CancelledError:
        connection.abort()  # the shadow notices, and stops
        raise
    told = Told(seconds=time.perf_counter() - answer.began, first_byte=answer.first_byte)
    told.whole = answer.size <= MAX_ANSWER
    told.status = status
    told.choices = read_choices(got) if told.whole else {}
    told.length = sum(len(said.text) for said in told.choices.values())
    return told


def _mirrored_body(asked: Asked, replica: Replica, seed: int | None) -> bytes:
    """What the client sent, under the shadow's name of the model, and with the seed that the
    client's answer was drawn with."""
    body = asked.body
    names = replica.names
    if isinstance(asked.model, str) and asked.model and names and asked.model not in names:
        body = with_model(body, names[0])
    if seed is not None and (asked.parsed or {}).get("seed") is None:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        body = msgspec.json.encode({**members, "seed": seed})
    return body


def difference(ours: Told, theirs: Told) -> str:
    """The outcome of a mirrored request, one of OUTCOMES. Reads the client's answer first."""
    if not (ours.whole and theirs.whole):
        return "too_long"
    status, body = _read_http(ours.raw)
    ours.status, ours.choices = status, read_choices(body)
    ours.length = sum(len(said.text) for said in ours.choices.values())
    if status != theirs.status:
        return "status"
    texts = {index: said.text for index, said in ours.choices.items()}
    if texts != {index: said.text for index, said in theirs.choices.items()}:
        return "text"
    return "equal" if ours.choices == theirs.choices else "finish_reason"


class _Reader:
    def __init__(self) -> None:
        self.body = bytearray()

    def on_body(self, data: bytes) -> None:
        self.body += data


def _read_http(raw: bytes) -> tuple[int, bytes]:
    reader = _Reader()
    parser = httptools.HttpResponseParser(reader)
    parser.feed_data(raw)
    return parser.get_status_code(), bytes(reader.body)


def read_choices(body: bytes) -> dict[int, Said]:
    """What the choices of a chat or text completion said, whole or in events. Nothing of what is
    neither."""
    choices: dict[int, Said] = {}
    lines = body.split(b"\n") if b"data: " in body[:4096] else (b"data: " + body,)
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        try:
            content = msgspec.json.decode(line.removeprefix(b"data: "))
        except msgspec.DecodeError:
            continue
        for choice in content.get("choices") or ():
            _add(choices.setdefault(choice.get("index", 0), Said()), choice)
    return choices


def _add(said: Said, choice: dict[str, Any]) -> None:
    message = choice.get("delta") or choice.get("message") or {}
    texts = [choice.get("text"), message.get("reasoning_content"), message.get("content")]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        texts += [function.get("name"), function.get("arguments")]
    said.text += "".join(text for text in texts if isinstance(text, str))
    said.finish_reason = choice.get("finish_reason") or said.finish_reason
