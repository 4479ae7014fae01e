"""Beam search and best_of: the search alone, and over HTTP."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import numpy as np
import pytest

from headrace.api.beam_search import BeamSearch, BeamSettings
from headrace.engine.client import TokenLogprobs
from headrace.errors import OverloadedError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
VOCAB, END = 6, 5


def next_tokens(token_ids: list[int], num_top: int) -> TokenLogprobs:
    """A language of its own: each text has a random distribution of next tokens."""
    logits = np.random.default_rng([7, *token_ids]).standard_normal(VOCAB) * 1.5
    logprobs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-logprobs)[:num_top]
    return TokenLogprobs(0.0, order.tolist(), logprobs[order].tolist())


def search(settings: BeamSettings, max_tokens: int) -> tuple[list[Any], int]:
    """The best sequences with their log-probabilities, and the number of steps."""
    state = BeamSearch(settings, frozenset({END}), max_tokens)
    steps = 0
    while state.running:
        state.advance([next_tokens(beam.token_ids, state.num_top) for beam in state.running])
        steps += 1
    return [(beam.token_ids, beam.logprob) for beam in state.best], steps


def all_sequences(max_tokens: int) -> list[tuple[list[int], float]]:
    """Every text that ends, or is as long as it may be."""
    found = []
    for length in range(1, max_tokens + 1):
        for body in itertools.product(range(END), repeat=length - 1):
            for last in range(VOCAB):
                if last != END and length < max_tokens:
                    continue
                token_ids, logprob = [*body, last], 0.0
                for position, token in enumerate(token_ids):
                    entry = next_tokens(token_ids[:position], VOCAB)
                    logprob += entry.top_logprobs[entry.top_token_ids.index(token)]
                found.append((token_ids, logprob))
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_search_that_is_wide_enough_finds_the_best(penalty: float) -> None:
    """Nothing is pruned: 15 beams hold all 5 texts of one token that go on."""
    settings = BeamSettings(15, penalty, "never")
    found, _ = search(settings, max_tokens=2)
    ranked = sorted(all_sequences(2), key=lambda one: -one[1] / len(one[0]) ** penalty)
    assert [token_ids for token_ids, _ in found] == [token_ids for token_ids, _ in ranked[:15]]
    assert [logprob for _, logprob in found] == pytest.approx([lp for _, lp in ranked[:15]])


def test_when_a_search_is_over() -> None:
    hasty, few = search(BeamSettings(2, 1.0, True), 30)
    usual, more = search(BeamSettings(2, 1.0, False), 30)
    patient, most = search(BeamSettings(2, 1.0, "never"), 30)
    assert few <= more <= most and few < most
    for found in (hasty, usual, patient):
        assert len(found) == 2
        assert all(token_ids[-1] == END or len(token_ids) == 30 for token_ids, _ in found)
    score = [max(lp / len(ids) for ids, lp in found) for found in (hasty, usual, patient)]
    assert score[0] <= score[1] <= score[2]


def test_it_repeats_itself() -> None:
    settings = BeamSettings(3)
    assert search(settings, 8) == search(settings, 8)


# --- over HTTP ----------------------------------------------------------------------------------


async def test_a_beam_search_over_http(site: Any, http: httpx.AsyncClient) -> None:
    """The fake engine's likeliest tokens are those from 65 on ("b", "c", ...) at each position."""
    body = {"prompt": "Hi", "use_beam_search": True, "n": 3, "max_tokens": 2, "logprobs": 1}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["bb", "bc", "cb"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    logprobs = answer["choices"][1]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.065, -0.066]
    assert logprobs["tokens"] == ["b", "c"] and logprobs["top_logprobs"][0] == {"b": -0.065}
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 6)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    prompts = [len(request.prompt_token_ids) for request in site.engine.requests]
    assert prompts == [2, 3, 3, 3], "one token a request"
    await site.settle()
    assert site.finished("length") == 3
    assert site.metric("generation_tokens_total", model_name="org/tiny") == 6


async def test_a_beam_search_in_a_chat(site: Any, http: httpx.AsyncClient) -> None:
    body = {
        "messages": MESSAGES,
        "use_beam_search": True,
        "n": 2,
        "max_tokens": 3,
        "stop_token_ids": [66],
        "logprobs": True,
    }
    answer = (await http.post(CHAT, json=body)).json()
    first, second = answer["choices"]
    assert first["message"]["content"] == "bbb" and first["finish_reason"] == "length"
    assert second["message"]["content"] == "bb" and second["finish_reason"] == "stop"
    assert [entry["token"] for entry in first["logprobs"]["content"]] == ["b", "b", "b"]


async def test_several_prompts(http: httpx.AsyncClient) -> None:
    body = {"prompt": ["A", "B"], "use_beam_search": True, "n": 2, "max_tokens": 1, "echo": True}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["Ab", "Ac", "Bb", "Bc"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"stop": "x"}, "stop"),
        ({"n": 20}, "n"),
        ({"length_penalty": 100.0}, "length_penalty"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping"),
    ],
)
async def test_what_cannot_go_with_a_search(
    site: Any, http: httpx.AsyncClient, fields: Any, param: str
) -> None:
    body = {"prompt": "Hi", "use_beam_search": True, "temperature": 0, **fields}
    response = await http.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    await site.settle()


async def test_neutral_values_go_with_a_search(http: httpx.AsyncClient) -> None:
    neutral = {"top_k": -1, "top_p": 1.0, "min_tokens": 0, "temperature": 1.0, "stop": []}
    body = {"prompt": "Hi", "use_beam_search": True, "max_tokens": 1, **neutral}
    assert (await http.post(COMPLETIONS, json=body)).status_code == 200
    body = {"prompt": "Hi", "length_penalty": 1.0, "early_stopping": False, "max_tokens": 1}
    assert (await http.post(COMPLETIONS, json=body)).status_code == 200


async def test_a_search_that_fails(site: Any, http: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "use_beam_search": True, "n": 2, "max_tokens": 5}
    site.engine.refuse = OverloadedError("The queue is full.")
    assert (await http.post(COMPLETIONS, json=body)).status_code == 429
    site.engine.refuse = None
    site.engine.fail_after = 0
    response = await http.post(COMPLETIONS, json=body)
    assert response.status_code == 500
    await site.settle()


async def test_a_client_that_leaves_ends_the_search(server: Any) -> None:
    site = server.site
    site.engine.step_seconds = 0.02
    body = {"prompt": "Hi", "use_beam_search": True, "n": 2, "max_tokens": 400}
    async with httpx.AsyncClient(base_url=server.url, timeout=1.0) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post(COMPLETIONS, json=body)
    await site.settle()
    assert site.finished("abort") == 2
    made = len(site.engine.requests)
    assert 2 < made < 400
    assert not site.engine.live


# --- best_of ------------------------------------------------------------------------------------


async def test_best_of(site: Any, http: httpx.AsyncClient, monkeypatch: Any) -> None:
    """The fake engine's log-probability of a token is -id / 100; here choices differ by seed."""
    monkeypatch.setattr(
        site.engine,
        "_logprobs",
        lambda token, top: TokenLogprobs(-token / 100, [], []),
    )
    answers = {11: "zz", 12: "aa", 13: "mm", 14: "a"}
    submit = site.engine.submit

    def by_seed(request: Any) -> Any:
        site.engine.answer = answers[request.sampling.seed]
        return submit(request)

    monkeypatch.setattr(site.engine, "submit", by_seed)
    body = {"prompt": "Hi", "n": 2, "best_of": 4, "seed": 11}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "a"), (1, "aa")]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 3 * 3 + 2
    body = {"prompt": ["Hi", "Ho"], "best_of": 2, "seed": 11, "echo": True, "logprobs": 0}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "Hiaa"), (1, "Hoaa")]
    assert answer["choices"][1]["logprobs"]["tokens"][:2] == ["H", "o"]
