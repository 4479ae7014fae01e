"""Streams that go on elsewhere: a door keeps their tokens, and another replica takes them up.

Wherever a stream is cut, what was forwarded and what another replica sends then are together the
events of a stream that was not cut. Only what tells times is left out: `usage.headrace`. Of several
choices the usage may come without cached_tokens, where their choice had ended before the cut.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.api.journal import MARK, Kept

from headrace.api import messages_output, reply
from headrace.text.tool_calls import ToolCallFormat

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
DOOR = {"headrace-journal": "1"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in "fg"
]
TYPE = {"type": "object"}
CALL = '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>'
CALLS = "Hm." + CALL + '<tool_call>{"name":"g","arguments":{}}</tool_call>'
ENDS = ("[DONE]", "event: message_stop", "event: response.completed", "event: response.incomplete")
CHOICES = {"stream_options": {"include_usage": True}}


def asking(path: str = CHAT, **more: Any) -> tuple[str, dict[str, Any]]:
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return path, {"model": "tiny", "stream": True, "max_tokens": 60, **CHOICES, **prompt, **more}


def messages(**more: Any) -> tuple[str, dict[str, Any]]:
    ask = [{"role": "user", "content": "Hi"}]
    return MESSAGES, {"model": "tiny", "stream": True, "max_tokens": 200, "messages": ask, **more}


def response(**more: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"model": "tiny", "stream": True, "input": "Hi", **more}


async def events_of(
    client: httpx.AsyncClient, path: str, body: Any, headers: Any = None
) -> list[str]:
    response = await client.post(path, json=body, headers=DOOR if headers is None else headers)
    assert response.status_code == 200, response.text
    return [event for event in response.text.split("\n\n") if event]


def plain(events: list[str]) -> list[str]:
    """As clients get them, and without what tells times."""
    kept = Kept()
    for event in events:
        kept.forward(event)
    several = len(kept.choices) > 2  # the usage counts as one
    told = [event for event in kept.forwarded if not event.startswith(":")]
    return [without_times(event, several=several) for event in told]


def without_times(event: str, *, several: bool) -> str:
    name, _, data = event.rpartition("data: ")
    if data == "[DONE]" or '"usage"' not in data:
        return event
    chunk = json.loads(data)
    response = chunk.get("response") or {}
    response.pop("completed_at", None)
    usage = chunk.get("usage") or response.get("usage") or {}
    usage.pop("headrace", None)
    if several:
        usage.pop("prompt_tokens_details", None)
    return f"{name}data: {json.dumps(chunk)}"


@pytest.fixture(autouse=True)
def later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream begins at a time of its own. Ids of calls, which are random, say nothing."""
    times = itertools.count(1_700_000_000)
    monkeypatch.setattr(reply, "time", SimpleNamespace(time=lambda: next(times)))
    monkeypatch.setattr(ToolCallFormat, "new_id", lambda form: "call_x")


async def cut_and_resumed(
    client: httpx.AsyncClient, path: str, body: Any, whole: list[str], cuts: Sequence[int]
) -> list[str]:
    """The events of a stream of which `whole` was seen until the first cut, and of each stream that
    took it up so many more."""
    kept, told, events = Kept(), [], whole
    for more in (*cuts, math.inf):
        seen = events[: int(min(more, len(events)))]
        told += seen
        for event in seen:
            kept.forward(event)
        if told and any(end in told[-1] for end in ENDS):
            break
        if more != math.inf:
            events = await events_of(client, path, {**body, "headrace_resume": kept.member})
    return told


async def check(site: Any, connect: Any, path: str, body: Any) -> list[str]:
    """Cut a stream after its events, and take it up. The events of the stream."""
    async with connect(site) as client:
        whole = await events_of(client, path, body)
        # Of streams that are long for their parts, every other event or so.
        for cut in range(1, len(whole), 1 + len(whole) // 60):
            told = await cut_and_resumed(client, path, body, whole, [cut])
            assert by_choice(told) == by_choice(whole), f"cut behind event {cut} of {whole}"
    await site.settle()
    return whole


def by_choice(events: list[str]) -> dict[Any, list[str]]:
    """Events by choice, for choices take turns as it happens; all others are None's."""
    sorted_out: dict[Any, list[str]] = {}
    for event in plain(events):
        choices = event.startswith('data: {"id"') and json.loads(event[6:])["choices"]
        sorted_out.setdefault(choices[0]["index"] if choices else None, []).append(event)
    return sorted_out


CASES: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "chat": (asking(), {}),
    "completions": (asking(COMPLETIONS), {}),
    "half characters": (asking(), {"answer": "aé漢🙂z"}),
    "the text ends in half a character": (asking(max_tokens=3), {"answer": "a漢"}),
    "a stop string": (asking(stop=["wor", "lx"]), {}),
    "a stop string in the text": (
        asking(COMPLETIONS, stop=["orl"], include_stop_str_in_output=True),
        {},
    ),
    "length": (asking(max_tokens=5), {}),
    "several choices": (asking(n=3), {}),
    "one choice after the other": (asking(n=3), {"last_first": True}),
    "several prompts": (asking(COMPLETIONS, prompt=["Hi", "Ho", "He"]), {}),
    "log-probabilities": (asking(logprobs=True, top_logprobs=2), {}),
    "log-probabilities of completions": (
        asking(COMPLETIONS, logprobs=2, echo=True, n=2, stop=["rl"]),
        {},
    ),
    "echo": (asking(COMPLETIONS, echo=True), {}),
    "token ids": (asking(return_token_ids=True), {}),
    "prompt log-probabilities": (asking(prompt_logprobs=1, n=2), {}),
    "the prompt alone": (asking(COMPLETIONS, echo=True, max_tokens=0, logprobs=1), {}),
    "usage in each event": (
        asking(stream_options={"include_usage": True, "continuous_usage_stats": True}),
        {},
    ),
    "no usage": (asking(stream_options=None), {}),
    "tool calls": (asking(tools=TOOLS, max_tokens=200), {"answer": CALLS}),
    "a broken tool call": (asking(tools=TOOLS, max_tokens=40), {"answer": CALLS}),
    "function_call": (
        asking(functions=[tool["function"] for tool in TOOLS], max_tokens=200),
        {"answer": CALL},
    ),
    "reasoning": (asking(), {"answer": "<think>I see.</think>\n\nYes."}),
    "several at once": (asking(stop=["ld"]), {"burst": 3}),
    "unknown fields": (asking(frobnicate=1), {}),
    "messages": (messages(stop_sequences=["ld"]), {}),
    "messages, as many as asked for": (messages(max_tokens=5), {"answer": "aé漢🙂z", "burst": 2}),
    "responses": (response(), {"burst": 2}),
    "responses, as long as asked for": (response(max_output_tokens=20), {"answer": "aé漢🙂z"}),
    "responses, reasoning and tool calls": (
        response(
            tools=[{"type": "function", "name": name, "parameters": TYPE} for name in "fg"],
        ),
        {"answer": f"<think>I see.</think>\n\n{CALLS}"},
    ),
    "responses in a format": (
        response(text={"format": {"type": "json_object"}}),
        {"answer": '{"a": 1}'},
    ),
    "messages, reasoning and tool calls": (
        messages(tools=[{"name": name, "input_schema": {"type": "object"}} for name in "fg"]),
        {"answer": f"<think>I see.</think>\n\n{CALLS}"},
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_stream_goes_on_wherever_it_was_cut(site: Any, http_to: Any, name: str) -> None:
    (path, body), engine = CASES[name]
    if "call" in name:
        site.engine.max_model_len = 2048
        site.model.text.choose_parsers(tool_calls="hermes")
    if "reasoning" in name:
        site.model.text.choose_parsers(reasoning="think")
    for knob, value in engine.items():
        setattr(site.engine, knob, value)
    whole = await check(site, http_to, path, body)
    assert any(end in whole[-1] for end in ENDS) and len(whole) > 2


async def test_pings_are_comments(site: Any, http_to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come when they come; doors do not count them."""
    monkeypatch.setattr(messages_output, "PING_SECONDS", 0.004)
    site.engine.step_seconds = 0.003
    whole = await check(site, http_to, *messages(max_tokens=5))
    assert ": ping" in whole and sum("event: ping" in event for event in whole) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    answer=st.text("ab\n\u00e9\U0001f642<>{}", min_size=1, max_size=12),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2),
    n=st.integers(1, 3),
    burst=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    path=st.sampled_from((CHAT, COMPLETIONS)),
)
async def test_any_text_may_be_cut_again_and_again(
    site_with: Any,
    http_to: Any,
    answer: str,
    stop: list[str],
    n: int,
    burst: int,
    cuts: list[int],
    path: str,
) -> None:
    site = site_with()
    site.engine.answer, site.engine.burst = answer, burst
    path, body = asking(path, stop=stop, n=n, max_tokens=20)
    async with http_to(site) as client:
        whole = await events_of(client, path, body)
        if cuts[0] == 0:
            return  # nothing is kept: it begins anew, under another id
        told = await cut_and_resumed(client, path, body, whole, cuts)
    assert by_choice(told) == by_choice(whole)


async def test_nothing_is_told_unless_a_door_asks(http: httpx.AsyncClient) -> None:
    path, body = asking()
    response = await http.post(path, json=body)
    assert "headrace-journal" not in response.headers and MARK not in response.text
    response = await http.post(
        path, json={**body, "stream": False, "stream_options": None}, headers=DOOR
    )
    assert response.status_code == 200 and "headrace-journal" not in response.headers
    response = await http.post(path, json=body, headers=DOOR)
    assert response.headers["headrace-journal"] == "1"
    assert response.text.startswith(MARK) and '"head":{"id":"chatcmpl-' in response.text


async def test_a_journal_costs_the_tokens_nothing_but_a_line(http: httpx.AsyncClient) -> None:
    path, body = asking(seed=7)
    asked = await events_of(http, path, body)
    not_asked = await events_of(http, path, body, headers={})
    differing = ("id", "created")

    def content(events: list[str]) -> list[Any]:
        chunks = [json.loads(e.removeprefix("data: ")) for e in plain(events)[:-1]]
        return [{k: v for k, v in chunk.items() if k not in differing} for chunk in chunks]

    assert content(asked) == content(not_asked)


async def test_a_seed_is_drawn_once(site: Any, http: httpx.AsyncClient) -> None:
    path, body = asking(n=2, temperature=1.0)
    whole = await events_of(http, path, body)
    await cut_and_resumed(http, path, body, whole, [5])
    first, second = site.engine.requests[:2], site.engine.requests[2:]
    assert [r.sampling.seed for r in first] == [r.sampling.seed for r in second]
    assert [len(r.resume_token_ids) for r in second] == [3, 2]
    assert {r.request_id for r in first}.isdisjoint(r.request_id for r in second)


async def test_what_has_ended_is_not_computed_again(site: Any, http: httpx.AsyncClient) -> None:
    path, body = asking(n=2)
    site.engine.last_first = True  # all of choice 1, then all of choice 0
    whole = await events_of(http, path, body)
    ends = [i for i, event in enumerate(whole) if '"finish_reason":"stop"' in event]
    await cut_and_resumed(http, path, body, whole, [ends[0] + 1])
    assert [r.request_id[-2:] for r in site.engine.requests[2:]] == ["-0"]
    await cut_and_resumed(http, path, body, whole, [ends[1] + 1])
    assert len(site.engine.requests) == 3


async def test_tokens_are_counted_where_they_are_made(site: Any, http: httpx.AsyncClient) -> None:
    path, body = asking()
    whole = await events_of(http, path, body)
    await site.settle()
    made = site.metric("generation_tokens_total", model_name="org/tiny")
    await cut_and_resumed(http, path, body, whole, [10])
    await site.settle()
    assert made == len(site.engine.answer) + 1
    assert site.metric("generation_tokens_total", model_name="org/tiny") == 2 * made - 10


async def test_a_grammar_is_behind_the_tokens(site: Any, http: httpx.AsyncClient) -> None:
    path, body = asking(response_format={"type": "json_object"})
    site.engine.answer = '{"a": 1}'
    whole = await events_of(http, path, body)
    await cut_and_resumed(http, path, body, whole, [4])
    request = site.engine.requests[1]
    assert request.grammar and site.engine.tokenizer.decode(request.resume_token_ids) == '{"a"'


WRONG: dict[str, Any] = {
    "no object": 3,
    "a choice twice": {"head": "HEAD", "c": [[0, [1], None], [0, [2], None]]},
    "no such choice": {"head": "HEAD", "c": [[2, [1], None]]},
    "no head": {"c": [[0, [1], None]]},
    "no token": {"head": "HEAD", "c": [[0, ["a"], None]]},
    "a token below 0": {"head": "HEAD", "c": [[0, [-1], None]]},
    "a token outside of the vocabulary": {"head": "HEAD", "c": [[0, [99999], None]]},
    "too many tokens": {"head": "HEAD", "c": [[0, [1] * 60, None]]},
    "tokens behind the end": {"head": "HEAD", "c": [[0, [65, 66, 67], None]]},
    "a long id": {"head": {"id": "x" * 65, "created": 1, "seed": 1}},
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_no_journal_makes_is_refused(
    site: Any, http: httpx.AsyncClient, name: str
) -> None:
    head = {"id": "a", "created": 1, "seed": 1, "fingerprint": site.model.fingerprint}
    value = WRONG[name]
    if isinstance(value, dict) and value.get("head") == "HEAD":
        value = {**value, "head": head}
    stop = site.engine.tokenizer.decode([66])
    path, body = asking(headrace_resume=value, stop=[stop] if "behind" in name else [])
    response = await http.post(path, json=body, headers=DOOR)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "headrace_resume"), response.text
    assert not len(site.services.ledger)


async def test_only_doors_send_it(http: httpx.AsyncClient) -> None:
    for path in (CHAT, COMPLETIONS):
        _, body = asking(path, headrace_resume={"c": []})
        response = await http.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "headrace_resume"


async def test_another_model_does_not_take_it_up(site: Any, http: httpx.AsyncClient) -> None:
    head = {"id": "a", "created": 1, "seed": 1, "fingerprint": "fp_another"}
    path, body = asking(headrace_resume={"head": head, "c": [[0, [1], None]]})
    response = await http.post(path, json=body, headers=DOOR)
    assert response.status_code == 503 and "other weights" in response.text
