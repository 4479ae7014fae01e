"""What a model thinks, told apart from what it answers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.text.message_text import MessageText, Reasoning, whole_message
from headrace.text.reasoning import FORMATS, ReasoningReader, reasoning_format
from headrace.text.tool_calls import FORMATS as CALL_FORMATS
from headrace.text.tool_calls import CallStart, Content
from headrace.text.tool_calls_reader import ToolCallReader

THINK = FORMATS["think"]


def read(parts: Iterable[str], *, begun: bool = False) -> tuple[str, str]:
    reader = ReasoningReader(THINK, begun=begun)
    thoughts = [*map(reader.push, parts), reader.finish()]
    return "".join(t.reasoning for t in thoughts), "".join(t.content for t in thoughts)


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        ("<think>\nHm, 2 < 3.\n</think>\n\nYes.\n", False, "Hm, 2 < 3.", "Yes.\n"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("Hm\n\n</think>\nYes", True, "Hm", "Yes"),
        ("<think>Hm</think>Yes", True, "Hm", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("</think>Yes", True, "", "Yes"),
        ("Yes", False, "", "Yes"),
        ("  Yes", False, "", "  Yes"),
        ("The <think> tag and </think>", False, "", "The <think> tag and </think>"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("<think>cut off \n", False, "cut off \n", ""),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
        (" " * 100, False, "", " " * 100),
        ("a" + " " * 100 + "b</think>", True, "a" + " " * 100 + "b", ""),
    ],
)
def test_what_is_read(text: str, begun: bool, reasoning: str, content: str) -> None:
    assert read([text], begun=begun) == read(text, begun=begun) == (reasoning, content)


FRAGMENTS = ("<think>", "</think>", "<", "</thi", "think>", " ", "\n", "a", "é", "<tool_call>")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10), st.booleans(), st.integers(1, 5))
def test_cuts_do_not_matter_and_nothing_is_lost(
    fragments: list[str], begun: bool, size: int
) -> None:
    text = "".join(fragments)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    reasoning, content = read(parts, begun=begun)
    assert (reasoning, content) == read([text], begun=begun)
    body = text.lstrip()
    if not begun and not body.startswith(THINK.open):
        expected = ("", text)
    else:
        before, _, after = body.removeprefix(THINK.open).partition(THINK.close)
        expected = (before, after)
    assert [part.split() for part in (reasoning, content)] == [part.split() for part in expected]


def test_thoughts_are_handed_on_as_they_arrive() -> None:
    reader = ReasoningReader(THINK)
    assert reader.push("<thi") == ("", "")
    assert reader.push("nk>\nHm") == ("Hm", "")
    assert reader.push(", so") == (", so", "")
    assert reader.thinking
    assert reader.push(".\n</think>\n\nYes") == (".", "Yes")
    assert not reader.thinking
    assert reader.push(" <think>") == ("", " <think>")


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("assistant<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
    ],
)
def test_a_prompt_may_open_the_reasoning(prompt: str, begun: bool) -> None:
    assert THINK.is_open_at_end(prompt) is begun


def test_a_continued_message_may_have_opened_it() -> None:
    assert THINK.is_open_in("<think>I was")
    assert not THINK.is_open_in("<think>I was</think>Yes")
    assert not THINK.is_open_in("Yes")


@pytest.mark.parametrize(
    ("template", "expected"),
    [("x <think> y </think>", "think"), ("[THINK][/THINK]", "mistral"), ("<|im_start|>", None)],
)
def test_the_template_tells_the_format(template: str, expected: str | None) -> None:
    assert reasoning_format("auto", template) is (FORMATS[expected] if expected else None)
    assert reasoning_format("none", template) is None
    assert reasoning_format("think", "") is THINK
    with pytest.raises(ConfigError, match="'nope' is not one of auto, none, think"):
        reasoning_format("nope", template)


def test_calls_are_read_after_the_reasoning_only() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>I could {call}</think>\n\n{call}"

    def chain(**options: bool) -> MessageText:
        calls = ToolCallReader(CALL_FORMATS["hermes"], ["f"])
        return MessageText(ReasoningReader(THINK), calls, **options)

    reader = chain()
    message = whole_message(reader.push(text) + reader.finish())
    assert (message.reasoning, message.content) == (f"I could {call}", "")
    assert [(made.name, made.arguments) for made in message.calls] == [("f", "{}")]
    without = chain(include_reasoning=False)
    pieces = without.push(text) + without.finish()
    assert isinstance(pieces[0], CallStart)
    assert not any(isinstance(piece, Reasoning | Content) for piece in pieces)
