"""The account of every request that reached an engine: opened once, closed once, in the metrics.

An account closes when its reader has left and the engine's record is there, in either order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from headrace.engine.client import FinishReason, RequestRecord


class RequestMeter(Protocol):
    def tokens(self, count: int) -> None: ...


class MetricsSink(Protocol):
    """The part of observability.metrics.Metrics that HTTP feeds and exposes."""

    @property
    def content_type(self) -> str: ...

    def render(self) -> bytes: ...

    def observe_http(self, route: str, method: str, status: int, seconds: float) -> None: ...

    def observe_rejected(self, reason: str) -> None: ...

    def track(self, request_id: str, arrival_time: float) -> RequestMeter: ...

    def observe_request(self, record: RequestRecord) -> None: ...


@dataclass(slots=True)
class _Account:
    record: RequestRecord | None = None
    reading: bool = True
    stopped_by_text: bool = False
    resumed_tokens: int = 0


class RequestLedger:
    """`close` is to be the engine client's callback for records."""

    def __init__(self, metrics: MetricsSink) -> None:
        self._metrics = metrics
        self._accounts: dict[str, _Account] = {}

    def __len__(self) -> int:
        """Requests that are running, or whose record is still to come."""
        return len(self._accounts)

    def open(
        self, request_id: str, arrival_time: float, *, resumed_tokens: int = 0
    ) -> RequestMeter:
        """`resumed_tokens`: those of the output that another server has made, and accounted for."""
        self._accounts[request_id] = _Account(resumed_tokens=resumed_tokens)
        return self._metrics.track(request_id, arrival_time)

    def leave(self, request_id: str, *, stopped_by_text: bool = False) -> None:
        """The reader is done. `stopped_by_text`: a stop string ended the request, which the engine
        took for an abort."""
        account = self._accounts.get(request_id)
        if account is not None:
            account.reading = False
            account.stopped_by_text = stopped_by_text
            self._settle(request_id, account)

    def close(self, record: RequestRecord) -> None:
        """The engine's last word on a request. Records of unknown requests are not HTTP's."""
        account = self._accounts.get(record.request_id)
        if account is not None:
            account.record = record
            self._settle(record.request_id, account)

    def _settle(self, request_id: str, account: _Account) -> None:
        record = account.record
        if account.reading or record is None:
            return
        del self._accounts[request_id]
        if account.stopped_by_text and record.finish_reason is FinishReason.ABORT:
            record = dataclasses.replace(record, finish_reason=FinishReason.STOP)
        if account.resumed_tokens:
            made = max(record.output_tokens - account.resumed_tokens, 0)
            record = dataclasses.replace(record, output_tokens=made)
        self._metrics.observe_request(record)
