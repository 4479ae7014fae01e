"""Limits on what waits hold for several processes together."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.test_attached_clients import INFO

from headrace.engine.client import ModelInfo, QueueLimits
from headrace.engine.live_requests import LiveRequests
from headrace.engine.queue_board import QueueBoard
from headrace.errors import OverloadedError
from headrace.sampling_params import GenerateRequest, SamplingParams


def live_requests(board: QueueBoard) -> LiveRequests:
    limits = QueueLimits(max_queued_requests=3, max_queued_tokens=50)
    return LiveRequests(limits, on_abort=lambda _: None, on_end=lambda _: None, board=board)


def request(request_id: str, length: int = 2) -> GenerateRequest:
    prompt = [1] * length
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1)
    )


def test_what_waits_in_one_process_counts_in_the_other(tmp_path: Path) -> None:
    info: ModelInfo = INFO
    boards = [QueueBoard(tmp_path / "board", 2, index) for index in range(2)]
    ours, theirs = map(live_requests, boards)
    streams = [ours.admit(request(name), info)[1] for name in ("a", "b")]
    theirs.admit(request("c"), info)
    with pytest.raises(OverloadedError, match="3 requests are waiting"):
        theirs.admit(request("d"), info)
    with pytest.raises(OverloadedError, match="3 requests are waiting"):
        ours.admit(request("d"), info)
    streams[0].abort()
    with pytest.raises(OverloadedError, match="4 prompt tokens are waiting"):
        theirs.admit(request("d", 47), info)
    theirs.admit(request("d", 46), info)
    reader = QueueBoard(tmp_path / "board", 2)
    assert (reader.others(), reader.num_live) == ((3, 50), 3)
    reader.clear(1)
    assert (reader.others(), reader.num_live) == ((1, 2), 1)
    ours.admit(request("e"), info)
