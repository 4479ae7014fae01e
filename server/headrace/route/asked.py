"""What the door reads of a request: the model, whether it streams, and where its kind goes."""

from __future__ import annotations

import enum
import secrets
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from headrace.route import targets
from headrace.route.choose import RouteRequest, key_of
from headrace.route.http_text import Headers, header
from headrace.route.prefix import Prefix

MAX_PARSED = 4 << 20
"""Of larger bodies only the few members below are read: the rest costs time and memory."""
_OPENING = 512
"""Bytes of a prompt by which requests without a session are told apart."""


class Kind(enum.Enum):
    """Where requests to a path go."""

    OWN = "answered by the door"
    MODEL = "to any replica of the model that the body names"
    KEPT = "to the one replica that keeps files and batches"
    BY_ID = "to the replica that has what the path names"
    PLAIN = "to any replica of the default application"
    NONE = "nowhere: 404"


OWN = frozenset(("/health", "/readyz", "/livez", "/metrics", "/v1/models", targets.PATH))
_MODEL = frozenset(
    (
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"),
        *("/v1/messages/count_tokens", "/v1/moderations", "/v1/rerank", "/v1/responses"),
        *("/v1/responses/input_tokens", "/v1/score"),
        # Other names of theirs, or those by which other servers have them.
        *("/rerank", "/v2/rerank", "/score", "/tokenize", "/detokenize", "/apply-template"),
    )
)
_KEPT = frozenset(("/v1/files", "/v1/batches"))
_BY_ID = ("/v1/responses/", "/v1/files/", "/v1/batches/")
OPEN_PATHS = frozenset(("/health", "/readyz", "/livez", "/metrics", "/version", targets.PATH))
"""That need no key."""
_CREATES = frozenset(("/v1/files", "/v1/batches"))
"""A POST that is sent twice makes two of them."""


def kind_of(path: str) -> Kind:
    if path in OWN or path.startswith("/v1/models/"):
        return Kind.OWN
    if path in _MODEL:
        return Kind.MODEL
    if path in _KEPT:
        return Kind.KEPT
    if path.startswith(_BY_ID):
        return Kind.BY_ID
    return Kind.PLAIN if path.startswith("/v1/") or path == "/version" else Kind.NONE


class Asked:
    """One request, read whole but for uploads."""

    __slots__ = (
        *("method", "url", "path", "headers", "body", "is_upload", "keep_alive", "http_1_0"),
        *("kind", "parsed", "model", "streams", "session", "request_id", "prefix"),
    )

    def __init__(self, method: bytes, url: bytes, headers: Headers) -> None:
        self.method, self.url, self.headers = method, url, headers
        raw_path = url.partition(b"?")[0]
        if not raw_path.startswith(b"/"):  # http://host/path, as to a proxy
            raw_path = b"/" + raw_path.partition(b"//")[2].partition(b"/")[2]
        self.path = unquote_to_bytes(raw_path).decode("utf-8", "replace")
        self.kind = kind_of(self.path)
        self.body = b""
        self.is_upload = False
        self.keep_alive = True
        self.http_1_0 = False
        self.parsed: dict[str, Any] | None = None
        self.model: Any = None
        self.streams = False
        self.prefix: Prefix | None = None
        self.session: str | None = None
        given = header(headers, b"x-request-id").decode("latin-1")
        self.request_id = given or secrets.token_hex(16)

    def read_body(self, body: bytes) -> None:
        """Take what is needed of a JSON body. What is wrong with it is the replica's to say."""
        self.body = body
        members: dict[str, Any] = {}
        if body:
            kind: Any = dict[str, Any] if len(body) <= MAX_PARSED else dict[str, msgspec.Raw]
            try:
                members = msgspec.json.decode(body, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                members = {}
        if len(body) > MAX_PARSED:
            small = (
                *("model", "stream", "user", "previous_response_id"),
                *("session_id", "prompt_cache_key"),
            )
            members = {
                name: msgspec.json.decode(members[name])
                for name in small
                if name in members and len(members[name]) < 4096
            }
        self.parsed = members
        self.model = members.get("model")
        self.streams = self.method == b"POST" and members.get("stream") is True
        session = header(self.headers, b"x-session-id").decode("latin-1")
        user = members.get("user")
        self.session = session or (user if isinstance(user, str) and user else None)

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after a replica that had it died."""
        if self.method in (b"GET", b"HEAD", b"OPTIONS"):
            return True
        return not self.is_upload and self.path not in _CREATES

    @property
    def searches(self) -> bool:
        """Whether a 404 of one replica says nothing about the others."""
        return self.kind is Kind.BY_ID or bool(self.parsed and self.previous_response)

    @property
    def previous_response(self) -> str:
        previous = (self.parsed or {}).get("previous_response_id")
        return previous if isinstance(previous, str) else ""

    @property
    def thing(self) -> str:
        """The id of what the request is about; empty if there is none."""
        if self.kind is Kind.BY_ID:
            return self.path.split("/")[3]
        return self.previous_response

    def route_request(self) -> RouteRequest:
        """For choose(), without knowledge of what is cached."""
        if self.session is not None:
            affinity = key_of(self.session.encode())
        else:
            affinity = key_of(self.body[:_OPENING])
        return RouteRequest(
            prompt_tokens=len(self.body) // 4 + 1, affinity=affinity, session=self.session
        )


def with_model(body: bytes, name: str) -> bytes:
    """A JSON object with another value of its member "model"; the other values keep their bytes."""
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    members["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(members)
