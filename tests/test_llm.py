"""LLM: the engine in this process, on the real default model."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from headrace import LLM, SamplingParams
from headrace.errors import ConfigError, ContextLengthExceededError, InvalidRequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(smollm2_path):
    with LLM(str(smollm2_path), max_model_len=512, kv_cache_memory_bytes=1 << 27) as llm:
        yield llm


def test_chat_answers(llm):
    [completion] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in completion.text
    assert completion.finish_reason == "stop"


def test_prompts_together_equal_prompts_alone(llm):
    prompts = ["Once upon a time", "The capital of France is", "def add(a, b):"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_n_choices_of_a_seed_differ_and_repeat(llm):
    sampling = SamplingParams(n=2, seed=7, temperature=1.0, max_tokens=8)
    first, second = llm.generate("My favourite colour is", sampling)
    assert first.token_ids != second.token_ids
    again = llm.generate("My favourite colour is", sampling)
    assert [c.token_ids for c in again] == [first.token_ids, second.token_ids]


def test_streamed_pieces_make_the_whole(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    assert "".join(llm.stream("Once upon a time", GREEDY)) == whole


def test_leaving_a_stream_frees_its_blocks(llm):
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for _ in zip(range(3), llm.stream("Once upon a time", long), strict=False):
        pass
    llm.generate("Hi", GREEDY)  # steps at least once after the abort
    assert llm._client.stats.running == 0
    assert llm._client.stats.kv_blocks_used == 0


def test_stop_strings_across_token_borders(llm):
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    stop = whole[10:16]
    [completion] = llm.generate(
        "Once upon a time", SamplingParams(temperature=0.0, max_tokens=12, stop=(stop,))
    )
    assert completion.finish_reason == "stop"
    assert completion.text == whole[: whole.index(stop)]


def test_a_bad_prompt_fails_alone(llm):
    with pytest.raises(ContextLengthExceededError):
        llm.generate("word " * 600, GREEDY)
    assert llm.generate("Hi", GREEDY)[0].token_ids


def test_it_works_inside_a_running_event_loop(llm):
    async def inside() -> str:
        return llm.generate("Hi", GREEDY)[0].text

    assert asyncio.run(inside()) == llm.generate("Hi", GREEDY)[0].text


def test_unknown_options_are_refused(smollm2_path):
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(str(smollm2_path), max_num_seq=3)


def test_bad_words_and_allowed_tokens(llm):
    [free] = llm.generate("Once upon a time", GREEDY)
    phrase = " ".join(free.text.split()[-2:])
    bad = dataclasses.replace(GREEDY, bad_words=(phrase,))
    assert phrase not in llm.generate("Once upon a time", bad)[0].text
    few = dataclasses.replace(GREEDY, allowed_token_ids=tuple(free.token_ids[:2]))
    assert set(llm.generate("Once upon a time", few)[0].token_ids) <= set(free.token_ids[:2])


def test_vectors_of_texts_together_equal_those_alone(llm):
    texts = ["A man is eating food.", "A man is eating bread.", "x"]
    together = llm.embed(texts)
    assert together == [llm.embed(text)[0] for text in texts]
    assert all(abs(sum(value * value for value in vector) - 1) < 1e-5 for vector in together)
    assert len(together[0]) == 576
    [cut] = llm.embed(texts[0], dimensions=64)
    length = sum(value * value for value in together[0][:64]) ** 0.5
    assert cut == pytest.approx([value / length for value in together[0][:64]], abs=1e-6)
    with pytest.raises(ContextLengthExceededError, match="takes 511"):
        llm.embed("word " * 600)


def test_an_encoder_embeds_and_does_not_generate(minilm_path):
    with LLM(str(minilm_path)) as encoder:
        near, nearer = encoder.embed(["A man is eating food.", "A man is eating bread."])
        assert sum(a * b for a, b in zip(near, nearer, strict=True)) > 0.6
        with pytest.raises(InvalidRequestError, match="generates nothing"):
            encoder.generate("Hello", GREEDY)
