"""Stop strings: found wherever the text is cut, held back no longer than needed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.output_text import OutputText
from headrace.text.stop import StopMatcher
from headrace.text.tokenizer import Tokenizer


def run(stops: list[str], parts: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    text = "".join(matcher.push(part) for part in parts)
    return text + matcher.finish(), matcher.found


def expected(stops: list[str], text: str, *, include: bool) -> tuple[str, str | None]:
    """By trying every end: the first place where a stop string ends, the longest if several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    parts=st.lists(st.text("abc", max_size=4), max_size=10),
    include=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_agrees_with_a_plain_search(stops: list[str], parts: list[str], include: bool) -> None:
    assert run(stops, parts, include=include) == expected(stops, "".join(parts), include=include)


@given(parts=st.lists(st.text("ab", max_size=4), max_size=12))
@settings(deadline=None)
def test_holds_back_less_than_a_stop_string(parts: list[str]) -> None:
    matcher = StopMatcher(["abab", "bb"])
    shown, seen = "", ""
    for part in parts:
        seen += part
        shown += matcher.push(part)
        if matcher.found is None:
            assert len(seen) - len(shown) < 4


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(part) for part in ("some", " text E", "N", "!", "END", "more")] == [
        "some",
        " text ",
        "",
        "EN!",
        "",
        "",
    ]
    assert matcher.found == "END"
    assert matcher.finish() == ""


def test_the_stop_string_may_span_tokens_and_characters(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    output = OutputText(tokenizer, stop=["👍!"])
    text = ""
    for token_id in tokenizer.encode("ok 👍!?", add_special_tokens=False):
        text += output.push(token_id)
        if output.stopped:
            break
    assert (text, output.stopped) == ("ok ", "👍!")


def test_stop_strings_are_ignored_before_min_tokens(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    output = OutputText(tokenizer, stop=["b"], min_tokens=3)
    text = "".join(output.push(token) for token in tokenizer.encode("abcab"))
    assert (text, output.stopped) == ("abca", "b")


def test_what_is_held_back_is_released_at_the_end(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    output = OutputText(tokenizer, stop=["xyz"])
    assert "".join(output.push(token) for token in tokenizer.encode("a xy")) == "a "
    assert output.finish() == "xy"
    assert output.stopped is None


def test_a_stop_token_shows_only_with_stop_strings(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    [token] = tokenizer.encode("a", add_special_tokens=False)
    assert OutputText(tokenizer).push_stop_token(token) == ""
    assert OutputText(tokenizer, include_stop_str_in_output=True).push_stop_token(token) == "a"
