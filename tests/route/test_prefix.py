"""What a door believes cached: keys of prefixes, eviction as in replicas, what answers teach."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.prefix_news import HEADER, PrefixNews
from headrace.route.prefix import (
    CHUNK,
    DEFAULT_CAPACITY,
    MAX_BYTES,
    NEWS_HEADER,
    PrefixIndex,
    news_of,
    prefix_of,
    told_of,
)

SYSTEM = {"role": "system", "content": "You are terse. " * 200}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """A system prompt, then turns of user and assistant."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "m", "messages": [SYSTEM, *turns], **more}


def shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Cuts that two requests share."""
    pairs = zip(prefix_of(one).keys, prefix_of(other).keys, strict=False)
    equal = [a == b for a, b in pairs]
    return equal.index(False) if False in equal else len(equal)


def test_a_longer_conversation_begins_with_the_shorter() -> None:
    first, second = chat("Hi"), chat("Hi", "Hello!", "And now?")
    assert shared(first, second) == len(prefix_of(first).keys)
    assert prefix_of(first).opening == prefix_of(second).opening
    assert prefix_of(chat("Ho")).opening != prefix_of(first).opening
    assert shared(first, chat("Ho")) == len(prefix_of(first).keys) - 1


@pytest.mark.parametrize(
    "more",
    [
        {"model": "other"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"cache_salt": "tenant"},
        {"chat_template_kwargs": {"thinking": True}},
    ],
)
def test_what_changes_the_whole_prompt_changes_all_keys(more: dict[str, Any]) -> None:
    assert shared(chat("Hi"), {**chat("Hi"), **more}) == 0


def test_what_changes_no_prompt_changes_no_key() -> None:
    assert prefix_of(chat("Hi")) == prefix_of(chat("Hi", temperature=1, max_tokens=9, stream=True))


def test_texts_are_cut_every_so_many_bytes() -> None:
    text = "x" * (3 * CHUNK)
    one, other = {"prompt": text + "a"}, {"prompt": text + "b"}
    assert shared(one, other) == 4  # the first two hold what comes before the text, too
    assert prefix_of(one).opening == prefix_of(other).opening
    # A list of prompts is taken for its first; tokens are text of their own kind.
    assert prefix_of({"prompt": [text + "a", "c"]}) == prefix_of(one)
    assert shared({"prompt": [1] * 9000 + [2]}, {"prompt": [1] * 9000 + [3]}) > 3


def test_responses_and_messages_bodies() -> None:
    body = {"model": "m", "instructions": "Be brief.", "input": [{"role": "user", "content": "a"}]}
    longer = {**body, "input": [*body["input"], {"role": "assistant", "content": "b"}]}
    assert shared(body, longer) == len(prefix_of(body).keys)
    assert prefix_of({"model": "m", "input": "a"}).num_bytes > 0
    claude = {"model": "m", "system": "Be brief.", "messages": [{"role": "user", "content": "a"}]}
    assert shared(claude, {**claude, "system": "Be long."}) == 0


values = st.sampled_from(
    [None, True, 3, "", "text", [], [1, 2], ["a", "b"], [None], {}, [{}], [{"role": 3}]]
    + [[{"role": "system"}], [{"role": "user", "content": [{"type": "text"}]}, 7], [[1], [2]]]
)


@given(st.dictionaries(st.sampled_from(["messages", "prompt", "input", "tools", "model"]), values))
def test_any_body_has_keys(body: dict[str, Any]) -> None:
    prefix = prefix_of(body)
    assert len(prefix.keys) == len(prefix.ends) > 0
    assert list(prefix.ends) == sorted(set(prefix.ends))


def test_only_so_many_bytes_are_keyed() -> None:
    prefix = prefix_of({"prompt": "x" * (4 * MAX_BYTES)})
    assert prefix.ends[-1] == MAX_BYTES
    assert prefix.num_bytes > 4 * MAX_BYTES


# --- the index --------------------------------------------------------------------------------


def test_the_longest_prefix_of_each_replica() -> None:
    index = PrefixIndex()
    index.sent(prefix_of(chat("Hi")), "a")
    index.sent(prefix_of(chat("Ho")), "b")
    asked = prefix_of(chat("Hi", "Hello!", "And now?"))
    found = index.match(asked)
    assert set(found) == {"a", "b"}
    assert found["a"] == index.estimate(prefix_of(chat("Hi")).ends[-1]) > found["b"] > 700
    assert index.match(prefix_of({"prompt": "Hi"})) == {}
    request = index.request(asked, session="s")
    assert request.prompt_tokens > found["a"]
    assert request.affinity != index.request(asked).affinity == asked.opening


def test_least_recently_used_prefixes_leave_first_and_tails_before_heads() -> None:
    index = PrefixIndex()
    index.set_capacity("a", 1200)  # the system prompt is 760 tokens
    old, kept, new = (prefix_of(chat(letter * 800)) for letter in "okn")
    index.sent(old, "a")
    index.sent(kept, "a")
    index.sent(new, "a")
    head = index.estimate(old.ends[-2])
    assert index.match(old) == {"a": head}
    assert index.match(kept)["a"] > head
    assert index.match(new)["a"] > head
    index.check_invariants()


def test_answers_teach_the_size_of_tokens() -> None:
    index, prefix = PrefixIndex(), prefix_of({"prompt": "x" * 5000})
    for _ in range(200):
        index.answered(prefix, index.request(prefix), "a", prefix.num_bytes // 2, 0)
    assert index.request(prefix).prompt_tokens == pytest.approx(prefix.num_bytes / 2, rel=0.05)


def test_a_replica_that_lost_what_it_held_is_believed_to_keep_less() -> None:
    index = PrefixIndex()
    prefixes = [prefix_of({"prompt": f"{number} " + "x" * 40_000}) for number in range(12)]
    for prefix in prefixes:
        index.sent(prefix, "a")
    assert "a" in index.match(prefixes[0])
    for _ in range(10):
        request = index.request(prefixes[-1])
        index.answered(prefixes[-1], request, "a", request.prompt_tokens, 0)
    assert index.match(prefixes[0]) == {}
    assert "a" in index.match(prefixes[-1])
    for _ in range(200):
        request = index.request(prefixes[-1])
        index.answered(prefixes[-1], request, "a", request.prompt_tokens, request.prompt_tokens)
    assert index._replicas["a"].capacity == DEFAULT_CAPACITY
    index.check_invariants()


def test_one_door_hears_from_the_replicas_what_another_one_sent() -> None:
    texts = [f"{number} " * 50 for number in range(31)]
    said, more = prefix_of(chat(*texts)), prefix_of(chat(*texts, "Yes.", "No?"))
    replica, there = PrefixNews(), PrefixIndex()
    before, _ = replica.since(0)
    assert HEADER == NEWS_HEADER
    replica.add(news_of(said))
    number, fresh = replica.since(before)
    there.heard("a", [*fresh, "2 ab:1", "1 ab:", "1 nothing:7", ""])
    assert there.match(more) == {"a": there.estimate(said.ends[-1])}
    assert there.match(prefix_of(chat(texts[0], "Else?")))["a"] > 700
    assert replica.since(number) == (number, [])
    there.check_invariants()


def test_news_are_bounded_and_told_once() -> None:
    replica = PrefixNews()
    began, _ = replica.since(0)
    for value in ("1 ab:12 cd:20", "nonsense", "1", "1 ab:12 " * 40, "1 xyz:1"):
        replica.add(value)
    assert replica.since(began) == (began + 1, ["1 ab:12 cd:20"])
    for number in range(3000):
        replica.add(f"1 {number:x}:1")
    last, kept = replica.since(began)
    assert (last, len(kept), kept[-1]) == (began + 3001, 1024, "1 bb7:1")
    assert replica.since(last - 2)[1] == ["1 bb6:1", "1 bb7:1"]
    assert replica.since(last + 5) == (last, [])


def test_what_an_answer_tells_of_its_prompt() -> None:
    assert told_of("tokens=812;cached=768") == (812, 768)
    assert [told_of(value) for value in ("", "tokens=812", "tokens=x;cached=1", "=;=")] == [
        None
    ] * 4


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "sent", "sent", "forget", "capacity", "answered"]),
            st.sampled_from("abc"),
            st.lists(st.sampled_from(["x", "y" * 900]), min_size=1, max_size=4),
            st.integers(0, 4000),
        ),
        max_size=30,
    )
)
def test_any_history(history: list[tuple[str, str, list[str], int]]) -> None:
    """Bounded, consistent, and a match never exceeds the prompt."""
    index = PrefixIndex(max_keys=20)
    for what, address, texts, number in history:
        prefix = prefix_of(chat(*texts))
        match what:
            case "sent":
                index.sent(prefix, address)
            case "forget":
                index.forget(address)
                assert address not in index.match(prefix)
            case "capacity":
                index.set_capacity(address, number)
            case _:
                index.answered(prefix, index.request(prefix), address, 900, number)
        index.check_invariants()
        request = index.request(prefix)
        assert all(held <= request.prompt_tokens for held in request.cached_tokens.values())
