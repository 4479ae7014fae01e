"""The default model through the official client: what an application developer sees."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, there was a little"

TOOL = {"type": "function", "function": {"name": "f"}}


# --- chat ---------------------------------------------------------------------------------------


def test_chat_answers_sensibly(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content is not None and "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.model == MODEL and answer.object == "chat.completion"
    assert answer.system_fingerprint
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens > 10 and usage.completion_tokens > 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_streamed_chat_is_the_same_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) == whole.usage.completion_tokens, "one event per token"


def test_chat_logprobs_explain_the_greedy_choice(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 4
    for entry in logprobs.content:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert [t.logprob for t in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode()
    assert text == answer.choices[0].message.content


def test_several_choices_share_a_prompt(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, seed=1, temperature=1.5, max_tokens=6
    )
    first, second = answer.choices
    assert (first.index, second.index) == (0, 1)
    assert first.message.content != second.message.content
    assert answer.usage is not None and answer.usage.completion_tokens <= 12


def test_streamed_choices_come_apart_by_index(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "messages": QUESTION, "n": 2, "seed": 1, "max_tokens": 6}
    whole = client.chat.completions.create(**arguments)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**arguments, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


# --- completions --------------------------------------------------------------------------------


def test_completion_continues_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_streamed_completion_is_the_same_completion(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "prompt": STORY, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0]
    chunks = list(client.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "length"


def test_batch_of_prompts_gives_what_each_gives_alone(client: openai.OpenAI) -> None:
    prompts = [STORY, "The capital of France is", "1, 2, 3, 4, 5,"]
    arguments: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    together = client.completions.create(prompt=prompts, **arguments)
    alone = [client.completions.create(prompt=p, **arguments).choices[0].text for p in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=STORY, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith(STORY)
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.token_logprobs is not None and logprobs.text_offset is not None
    assert answer.usage is not None
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + 1
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [
        len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    arguments: Any = {"model": MODEL, "prompt": "1, 2, 3, 4, 5,", "temperature": 0}
    arguments |= {"max_tokens": 40, "stop": [" 8, 9"]}  # spans several tokens
    if stream:
        chunks = list(client.completions.create(**arguments, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**arguments).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (" 6, 7,", "stop")


def test_seed_repeats_and_another_seed_does_not(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return (
            client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=8, temperature=1.5, seed=seed
            )
            .choices[0]
            .text
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_extensions_pass_through_extra_body(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=STORY,
        max_tokens=6,
        temperature=1,
        extra_body={"top_k": 1, "ignore_eos": True, "min_tokens": 6, "return_token_ids": True},
    )
    greedy = client.completions.create(model=MODEL, prompt=STORY, max_tokens=6, temperature=0)
    assert answer.choices[0].text == greedy.choices[0].text
    assert len(answer.choices[0].model_extra["token_ids"]) == 6  # type: ignore[index]


# --- the rest of the surface --------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    extra = client.models.retrieve(MODEL).model_extra
    assert extra is not None
    assert extra["max_model_len"] == 2048 and extra["state"] == "ready"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", extra["digest"])


def test_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=QUESTION)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [("word " * 3000, 5), ("hello", 2048), ("word " * 100_000, None)]
)
def test_context_too_long(client: openai.OpenAI, prompt: str, max_tokens: int | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_bad_parameters_are_named(
    client: openai.OpenAI, arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, **arguments)
    assert caught.value.param == param and param in caught.value.message
    assert caught.value.type == "invalid_request_error" and isinstance(caught.value.code, str)


@pytest.mark.parametrize(
    "text", ["Hello, world!", "naïve 日本語 🙂\n\n  tabs\t", "<|im_start|>user"]
)
def test_tokenize_round_trip(server: Server, text: str) -> None:
    tokenized = server.post("/tokenize", {"prompt": text}).json()
    assert tokenized["count"] == len(tokenized["tokens"]) > 0
    detokenized = server.post("/detokenize", {"tokens": tokenized["tokens"]}).json()
    assert detokenized == {"prompt": text}


def test_chat_prompt_is_what_tokenize_shows(server: Server, client: openai.OpenAI) -> None:
    tokens = server.post("/tokenize", {"messages": QUESTION}).json()["tokens"]
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(tokens)


def test_version_and_probes(server: Server) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", server.get("/version").json()["version"])
    for probe in ("/readyz", "/health"):
        assert server.get(probe).json() == {"status": "ready"}
    assert server.get("/livez").json()["engines"][MODEL]["state"] == "ready"


def test_request_id_is_echoed_or_made(server: Server, client: openai.OpenAI) -> None:
    raw = client.with_options(default_headers={"x-request-id": "order-66"})
    response = raw.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=1
    )
    assert response.headers["x-request-id"] == "order-66"
    made = [server.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch(r"[0-9a-f]{32}", one) for one in made)
    hostile = httpx.get(f"{server.url}/version", headers={"x-request-id": "two words"})
    assert hostile.headers["x-request-id"] != "two words"


def test_metrics_move_and_account(server: Server, client: openai.OpenAI) -> None:
    before = server.wait_idle()
    client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=7, extra_body={"ignore_eos": True}
    )
    for chunk in client.completions.create(model=MODEL, prompt=STORY, max_tokens=9, stream=True):
        del chunk
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=STORY, temperature=-1)
    after = server.wait_idle()

    def moved(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert moved("headrace_requests_accepted_total") == 2
    assert server.finished(after) == after["headrace_requests_accepted_total"]
    assert moved("headrace_requests_rejected_total{invalid_value}") == 1
    assert 7 < moved("headrace_generation_tokens_total") <= 16
    assert moved("headrace_prompt_tokens_total") == moved("headrace_prefix_cache_queries_total") > 0
    assert moved("headrace_time_to_first_token_seconds_count") == 2
    assert moved("headrace_e2e_request_latency_seconds_count") == 2
    assert moved("headrace_inter_token_latency_seconds_count") == (
        moved("headrace_generation_tokens_total") - 2
    )
    assert moved("headrace_engine_steps_total") >= 7
    assert after["headrace_kv_cache_blocks{used}"] == 0
    for ours, theirs in (
        ("generation_tokens_total", "generation_tokens_total"),
        ("requests_running", "num_requests_running"),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
    ):
        assert after[f"headrace_{ours}"] == after[f"vllm:{theirs}"]
    assert after["headrace_model_info"] == 1


# --- what may be sampled, and what was done -------------------------------------------------------


def test_bad_words_are_written_differently(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "prompt": STORY, "max_tokens": 16, "temperature": 0}
    free = client.completions.create(**arguments).choices[0].text
    words = free.split()
    one, several = words[0], " ".join(words[2:5])
    extra = {"bad_words": [one, several]}
    whole = client.completions.create(**arguments, extra_body=extra).choices[0].text
    assert one not in whole.split() and several not in whole
    stream = client.completions.create(**arguments, extra_body=extra, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole
    later = client.completions.create(**arguments, extra_body={"bad_words": [several]})
    assert later.choices[0].text.split()[:2] == words[:2]
    assert several not in later.choices[0].text


def test_only_allowed_tokens_are_written(client: openai.OpenAI, server: Server) -> None:
    url = f"{server.url}/tokenize"
    digits = [httpx.post(url, json={"prompt": d}).json()["tokens"][0] for d in "0123456789"]
    extra = {"allowed_token_ids": digits, "return_token_ids": True}
    answer = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=20, temperature=2, seed=1, extra_body=extra
    )
    assert re.fullmatch(r"\d{20}", answer.choices[0].text)
    assert set((answer.choices[0].model_extra or {})["token_ids"]) <= set(digits)


def test_the_parameters_told_repeat_the_answer(client: openai.OpenAI) -> None:
    arguments: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 12}
    raw = client.chat.completions.with_raw_response.create(**arguments, temperature=1.5, n=2)
    first, told = raw.parse(), json.loads(raw.headers["headrace-sampling"])
    again = client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body=told)
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert first.usage is not None
    times = (first.usage.model_extra or {})["headrace"]
    assert times["preemptions"] == 0
    assert times["prefill_ms"] > 0 and times["decode_ms"] > 0 and times["queue_ms"] >= 0
    whole = float(raw.headers["openai-processing-ms"])
    assert sum(times[f"{stage}_ms"] for stage in ("queue", "prefill", "decode")) <= whole + 1


def test_a_language_model_makes_vectors(client: openai.OpenAI, server: Server) -> None:
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose again."]
    together = client.embeddings.create(model=MODEL, input=texts)
    vectors = [entry.embedding for entry in together.data]
    assert {len(vector) for vector in vectors} == {576}
    alone = client.embeddings.create(model=MODEL, input=texts[1])
    assert alone.data[0].embedding == vectors[1]
    scores = server.post("/v1/score", {"text_1": texts[0], "text_2": texts[1:]}).json()["data"]
    assert scores[0]["score"] > scores[1]["score"]
    with pytest.raises(openai.BadRequestError, match="Matryoshka"):
        client.embeddings.create(model=MODEL, input="a", dimensions=64)
