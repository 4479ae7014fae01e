"""Admission, delivery and replay on the client's side."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from headrace.engine.client import (
    FinishReason,
    ModelInfo,
    QueueLimits,
    RequestOutput,
    RequestRecord,
    StepOutputs,
    Task,
)
from headrace.engine.live_requests import LiveRequests
from headrace.errors import (
    ContextLengthExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
)
from headrace.sampling_params import GenerateRequest, PoolingParams, SamplingParams

INFO = ModelInfo(
    max_model_len=32,
    vocab_size=100,
    eos_token_ids=[0],
    num_blocks=8,
    block_size=4,
    max_num_seqs=4,
    dtype="float32",
    device="cpu",
    weight_bytes=1,
    kv_cache_bytes=1,
    load_seconds=0.1,
    kernels={},
)


def request(request_id: str = "a", tokens: int = 3, **sampling) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[1] * tokens,
        sampling=SamplingParams(**sampling),
    )


@pytest.fixture
def aborted() -> list[str]:
    return []


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def live(aborted, records) -> LiveRequests:
    limits = QueueLimits(max_queued_requests=3, max_queued_tokens=20)
    return LiveRequests(limits, on_abort=aborted.append, on_end=records.append)


def record(request_id: str, reason: FinishReason) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        finish_reason=reason,
        prompt_tokens=3,
        output_tokens=1,
        cached_tokens=0,
        preemptions=0,
        arrival_time=0.0,
        scheduled_time=0.0,
        first_token_time=0.0,
        finished_time=0.0,
    )


def end(request_id: str, token: int, reason: FinishReason = FinishReason.STOP) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        token_ids=[token],
        finish_reason=reason,
        record=record(request_id, reason),
    )


async def test_outputs_that_wait_are_read_as_one(live, records):
    handle, stream = live.admit(request(), INFO)
    first = RequestOutput(request_id="a", token_ids=[5])
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[first]))
    live.deliver(StepOutputs(handles=[handle], token_ids=[6], details=[]))
    live.deliver(StepOutputs(handles=[handle], token_ids=[7], details=[]))
    output = await anext(stream)
    assert output.token_ids == [5, 6, 7]
    assert output.finish_reason is None
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[end("a", 0)]))
    output = await anext(stream)
    assert (output.token_ids, output.finish_reason) == ([0], FinishReason.STOP)
    assert output.record == records[0]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert len(live) == 0


async def test_an_abort_ends_the_stream_and_ignores_what_still_comes(live, aborted, records):
    handle, stream = live.admit(request(), INFO)
    stream.abort()
    stream.abort()
    assert aborted == ["a"]
    late = StepOutputs(handles=[handle], token_ids=[9], details=[end("a", 1, FinishReason.ABORT)])
    live.deliver(late)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert [r.finish_reason for r in records] == [FinishReason.ABORT]


async def test_both_queue_limits_refuse_and_first_tokens_make_room(live):
    live.admit(request("a"), INFO)
    live.admit(request("b", tokens=15), INFO)
    with pytest.raises(OverloadedError, match="18 prompt tokens are waiting"):
        live.admit(request("c", tokens=5), INFO)
    live.admit(request("c", tokens=2), INFO)
    with pytest.raises(OverloadedError, match="3 requests are waiting") as caught:
        live.admit(request("d"), INFO)
    assert 1.0 <= caught.value.retry_after <= 60.0
    first = RequestOutput(request_id="b", token_ids=[5])
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[first]))
    live.admit(request("d"), INFO)


@pytest.mark.parametrize(
    ("bad", "error", "param"),
    [
        (request(tokens=0), InvalidRequestError, "prompt"),
        (request(tokens=32), ContextLengthExceededError, "messages"),
        (request(stop_token_ids=(100,)), InvalidRequestError, "stop_token_ids"),
        (request(logit_bias={-1: 1.0}), InvalidRequestError, "logit_bias"),
        (dataclasses.replace(request(), prompt_token_ids=[100]), InvalidRequestError, "prompt"),
        (dataclasses.replace(request(), prompt_token_ids=[-1]), InvalidRequestError, "prompt"),
    ],
)
async def test_what_the_model_cannot_take_is_refused_by_name(live, bad, error, param):
    with pytest.raises(error) as caught:
        live.admit(bad, INFO)
    assert caught.value.param == param
    assert len(live) == 0


async def test_two_requests_of_one_id_are_refused(live):
    live.admit(request(), INFO)
    with pytest.raises(InvalidRequestError, match="running already"):
        live.admit(request(), INFO)


async def test_replay_resumes_from_what_was_received_with_the_same_seed(live):
    handle, stream = live.admit(request(prompt_logprobs=1), INFO)
    seed = stream.request.sampling.seed
    assert seed is not None
    first = RequestOutput(request_id="a", token_ids=[5])
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[first]))
    live.deliver(StepOutputs(handles=[handle], token_ids=[6], details=[]))
    [(replayed_handle, replay)] = live.replays()
    assert replayed_handle == handle
    assert replay.resume_token_ids == [5, 6]
    assert replay.sampling.seed == seed
    assert replay.sampling.prompt_logprobs is None, "they were delivered with the first token"


async def test_a_request_that_kills_engines_is_failed_and_the_others_go_on(live, records):
    _, killer = live.admit(request("killer"), INFO)
    first = RequestOutput(request_id="killer", token_ids=[5])
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[first]))
    live.admit(request("waiting"), INFO)
    assert [r.request_id for _, r in live.replays()] == ["killer", "waiting"]
    assert [r.request_id for _, r in live.replays()] == ["waiting"]
    with pytest.raises(EngineError, match="died repeatedly"):
        await anext(killer)
    assert [r.finish_reason for r in records] == [FinishReason.ERROR]


async def test_fail_all_reaches_every_reader(live):
    _, stream = live.admit(request(), INFO)
    live.fail_all(EngineError("gone"))
    for _ in range(2):
        with pytest.raises(EngineError, match="gone"):
            await anext(stream)
    assert len(live) == 0


ENCODER = dataclasses.replace(INFO, tasks=[Task.EMBED])


def pooled(request_id: str = "a", tokens: int = 3) -> GenerateRequest:
    return dataclasses.replace(request(request_id, tokens), pooling=PoolingParams())


async def test_a_vector_ends_its_request(live, records):
    _, stream = live.admit(pooled(), ENCODER)
    account = record("a", FinishReason.STOP)
    output = RequestOutput(
        request_id="a", vector=b"1234", finish_reason=FinishReason.STOP, record=account
    )
    live.deliver(StepOutputs(handles=[], token_ids=[], details=[output]))
    received = await anext(stream)
    assert (received.vector, received.token_ids) == (b"1234", [])
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert len(live) == 0 and [one.request_id for one in records] == ["a"]


def test_an_encoder_takes_its_full_length_and_generates_nothing(live):
    live.admit(pooled("full", tokens=32), ENCODER)
    with pytest.raises(ContextLengthExceededError, match="33 tokens, and the model takes 32"):
        live.admit(pooled(tokens=33), ENCODER)
    with pytest.raises(ContextLengthExceededError, match="32 tokens, and the model takes 31"):
        live.admit(pooled(tokens=32), INFO)
    with pytest.raises(InvalidRequestError, match="generates nothing"):
        live.admit(request(), ENCODER)


async def test_a_vector_that_kills_engines_is_given_up(live):
    """It waits for nothing before its end, so whether it was the cause is not known."""
    _, killer = live.admit(pooled("killer"), ENCODER)
    assert [r.request_id for _, r in live.replays()] == ["killer"]
    assert list(live.replays()) == []
    with pytest.raises(EngineError, match="died repeatedly"):
        await anext(killer)


async def test_a_reader_is_called_once_for_all_that_arrived_in_one_turn(live, records):
    handle, stream = live.admit(request(), INFO)
    live.deliver(StepOutputs([], [], [RequestOutput(request_id="a", token_ids=[5])]))
    outputs: list[RequestOutput] = []
    reading = asyncio.create_task(stream.read(outputs.append))
    await asyncio.sleep(0)
    live.deliver(StepOutputs([handle], [6], []))
    live.deliver(StepOutputs([handle], [7], []))
    assert [output.token_ids for output in outputs] == [[5]]
    await asyncio.sleep(0)
    live.deliver(StepOutputs([], [], [end("a", 0)]))
    await reading
    assert [output.token_ids for output in outputs] == [[5], [6, 7], [0]]
    assert outputs[-1].record == records[0]


@pytest.mark.parametrize("waits", [False, True])
async def test_what_a_reader_raises_ends_its_reading_and_no_other(live, waits):
    handles, streams = zip(*(live.admit(request(name), INFO) for name in "ab"), strict=True)
    seen: list[RequestOutput] = []

    def fail(output: RequestOutput) -> None:
        raise ZeroDivisionError

    tasks = [asyncio.create_task(streams[0].read(fail))] if waits else []
    other = asyncio.create_task(streams[1].read(seen.append))
    await asyncio.sleep(0)
    live.deliver(StepOutputs(list(handles), [8, 9], []))
    tasks = tasks or [asyncio.create_task(streams[0].read(fail))]
    with pytest.raises(ZeroDivisionError):
        await tasks[0]
    streams[1].abort()
    await other
    assert [output.token_ids for output in seen] == [[9]]


async def test_a_reader_may_abort_and_hears_no_more(live, aborted):
    handle, stream = live.admit(request(), INFO)
    seen: list[RequestOutput] = []

    def once(output: RequestOutput) -> None:
        seen.append(output)
        stream.abort()

    reading = asyncio.create_task(stream.read(once))
    await asyncio.sleep(0)
    live.deliver(StepOutputs([handle], [5], []))
    await reading
    live.deliver(StepOutputs([handle], [6], []))
    await asyncio.sleep(0)
    assert ([output.token_ids for output in seen], aborted) == ([[5]], ["a"])


async def test_a_lost_engine_reaches_a_reader_and_one_who_comes_later(live):
    _, stream = live.admit(request(), INFO)
    reading = asyncio.create_task(stream.read(lambda output: None))
    await asyncio.sleep(0)
    live.fail_all(EngineError("gone"))
    with pytest.raises(EngineError, match="gone"):
        await reading
    with pytest.raises(EngineError, match="gone"):
        await stream.read(lambda output: None)
    with pytest.raises(EngineError, match="gone"):
        await anext(stream)


async def test_who_waits_is_not_woken_for_what_was_read_meanwhile(live):
    handle, stream = live.admit(request(), INFO)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    live.deliver(StepOutputs([handle], [5], []))
    asyncio.get_running_loop().call_soon(live.deliver, StepOutputs([handle], [6], []))
    assert (await waiting).token_ids == [5, 6]
    again = asyncio.create_task(anext(stream))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not again.done()
    live.deliver(StepOutputs([handle], [7], []))
    assert (await again).token_ids == [7]
