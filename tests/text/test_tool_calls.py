"""Tool calls in every format: what is read, what is given back, and that cuts do not matter."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.text.message_text import MessageText, whole_message
from headrace.text.tool_calls import (
    FORMATS,
    Arguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Piece,
    tool_call_format,
)
from headrace.text.tool_calls_reader import MAX_HELD, ToolCallReader

NAMES = ("f", "get-weather", "web.search")


def read(form: str, parts: Iterable[str]) -> list[Piece]:
    """All pieces, neighbours of a kind joined, ids left out."""
    reader = ToolCallReader(FORMATS[form], NAMES)
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.finish()
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, CallStart):
            piece = CallStart("", piece.name)
        elif isinstance(piece, Content | Arguments) and isinstance(last, type(piece)):
            piece = type(piece)(joined.pop()[0] + piece.text)  # type: ignore[operator, misc]
        joined.append(piece)
    return joined


def whole(form: str, text: str, **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Content, and the calls with their arguments parsed."""
    chain = MessageText(calls=ToolCallReader(FORMATS[form], NAMES), **options)
    message = whole_message(chain.push(text) + chain.finish())
    return message.content, [(call.name, json.loads(call.arguments)) for call in message.calls]


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


F = '{"name": "f", "arguments": {"a": 1}}'
TRICKY = {
    "a": 'br}ace {"x": [',
    "b": "</tool_call>",
    "é": "ü\n\t\\ \U0001f600",
    "n": [[], {}, None],
}
CALLS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", hermes(F), "", [("f", {"a": 1})]),
    ("hermes", f"Let me see.\n\n{hermes(F)}\n", "Let me see.", [("f", {"a": 1})]),
    ("hermes", f" {hermes(F, F)}\n\nDone. ", "Done. ", [("f", {"a": 1})] * 2),
    ("hermes", f"a{hermes(F)}b{hermes(F)}c", "abc", [("f", {"a": 1})] * 2),
    ("hermes", hermes(json.dumps({"name": "f", "arguments": TRICKY})), "", [("f", TRICKY)]),
    (
        "hermes",
        hermes(json.dumps({"arguments": TRICKY, "name": "f"}, ensure_ascii=False)),
        "",
        [("f", TRICKY)],
    ),
    ("hermes", '<tool_call>{"name":"get-weather"}</tool_call>', "", [("get-weather", {})]),
    ("hermes", hermes('{"name": "f", "arguments": null}'), "", [("f", {})]),
    ("hermes", hermes('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [("f", {"a": 1})]),
    ("hermes", hermes('{"name": "f", "id": 7, "arguments": {}, "x": [1]}'), "", [("f", {})]),
    ("hermes", hermes('{"name": "f", "arguments": {"a": "C:\\dir, it\\\'s\nnew"}}'), "",
     [("f", {"a": "C:\\dir, it's\nnew"})]),
    ("hermes", hermes('{"name": "f", "arguments": {"a": "\\ud83d\\ude00\\u00e9"}}'), "",
     [("f", {"a": "\U0001f600é"})]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":1}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", f"<tool_call>{F}", "", [("f", {"a": 1})]),
    ("hermes", hermes(F + "}") + "}", "}", [("f", {"a": 1})]),
    ("hermes", f"<tool_call>[{F}, {F}]</tool_call>", "", [("f", {"a": 1})] * 2),
    ("hermes", f"<tool_call <tool_{hermes(F)}", "<tool_call <tool_", [("f", {"a": 1})]),
    ("hermes", F, F, []),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 2}}', "",
     [("f", {}), ("f", {"b": 2})]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "",
     [("f", {})]),
    ("llama3_json", 'I call <|python_tag|>{"function": "f", "parameters": {}}', "I call",
     [("f", {})]),
    ("llama3_json", '{"function": {"name": "f", "arguments": {"a": 1}}}', "", [("f", {"a": 1})]),
    ("llama3_json", f"Like {F}", f"Like {F}", []),
    ("llama3_json", '{"city": "Paris", "name": "f"}', '{"city": "Paris", "name": "f"}', []),
    ("mistral", f"[TOOL_CALLS][{F}]", "", [("f", {"a": 1})]),
    ("mistral", f"[TOOL_CALLS] [{F}, {F}] ok", "ok", [("f", {"a": 1})] * 2),
    ("mistral", '[TOOL_CALLS]web.search[ARGS]{"q": "[TOOL_CALLS]"}', "",
     [("web.search", {"q": "[TOOL_CALLS]"})]),
    ("mistral", 'Hm [TOOL_CALLS]f[CALL_ID]ab12[ARGS]{"a": 1}[TOOL_CALLS]f{"b": 2}', "Hm",
     [("f", {"a": 1}), ("f", {"b": 2})]),
    ("mistral", "[1] and [TOOL_", "[1] and [TOOL_", []),
    ("pythonic", "[f()]", "", [("f", {})]),
    ("pythonic", "[f(a=1, b='x'), get-weather(city=\"It's\")]", "",
     [("f", {"a": 1, "b": "x"}), ("get-weather", {"city": "It's"})]),
    (
        "pythonic",
        "<|python_start|>[f(a=[1, -2.5, (3,)], b={'k': None, 'l': True,}, "
        "c='\"\\'\\n\\x41\\U0001f600\\d')]"
        "<|python_end|>",
        "",
        [("f", {"a": [1, -2.5, [3]], "b": {"k": None, "l": True}, "c": "\"'\nA\U0001f600\\d"})],
    ),
    ("pythonic", "[f(a=0x10, b=1_000, c=.5, d=1., e=true,)]", "",
     [("f", {"a": 16, "b": 1000, "c": 0.5, "d": 1.0, "e": True})]),
    ("pythonic", "[1, 2, 3] are numbers", "[1, 2, 3] are numbers", []),
    ("pythonic", "[f('positional')]", "[f('positional')]", []),
    ("pythonic", "Call [f(a=1)]", "Call [f(a=1)]", []),
    ("granite", f"<|tool_call|>[{F}]", "", [("f", {"a": 1})]),
    ("generic", hermes(F), "", [("f", {"a": 1})]),
    ("generic", f"\n{F}", "", [("f", {"a": 1})]),
    ("generic", f"```json\n{F}\n```", "", [("f", {"a": 1})]),
    ("generic", f"```\n[{F}, {F}]\n```\n", "", [("f", {"a": 1})] * 2),
    ("generic", '```python\nprint("f")\n```', '```python\nprint("f")\n```', []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLS)
def test_what_is_read(form: str, text: str, content: str, calls: Any) -> None:
    assert whole(form, text) == (content, calls)
    assert read(form, text) == read(form, [text])


NO_CALLS = [
    ("hermes", "<tool_call>\nnot json\n</tool_call>"),
    ("hermes", hermes('{"name": "unknown", "arguments": {}}')),
    ("hermes", hermes('{"name": ["f"], "arguments": {}}')),
    ("hermes", hermes('{"arguments": {}}')),
    ("hermes", hermes('{"name": "f", "arguments": [1]}')),
    ("hermes", hermes('{"name": "f", "arguments": "no object"}')),
    ("hermes", hermes('{"name": "f", "arguments": "{\\"a\\": NaN}"}')),
    ("hermes", hermes('{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}')),
    ("hermes", hermes('{"name": "f", "name": "f", "arguments": {}}')),
    ("hermes", "<tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", '<tool_call>{"name": "f'),
    ("hermes", "  <tool_c"),
    ("hermes", " \n " * 100),
    ("hermes", "[" * 1000),
    ("llama3_json", '{"name": "Ann", "age": 5}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]f[ARGS]text"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[f(1a=2)]"),
    ("generic", '```json\n{"name": "Ann"}\n```'),
    ("generic", '{"name": "f", "arguments": ' + "[" * 100),
]


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(form: str, text: str) -> None:
    assert read(form, [text]) == read(form, text) == [Content(text)]


BROKEN = [
    # form, text, arguments that were handed on, content after it
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "lo', '{"a": "lo', ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tr', '{"a": tr', ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\u00e', '{"a": "\\u00e', ""),
    ("hermes", hermes('{"name": "f", "arguments": {"a": True}}'), '{"a": ',
     "True}}\n</tool_call>"),
    ("hermes", hermes("{\"name\": \"f\", \"arguments\": {'a': 1}}"), "{",
     "'a': 1}}\n</tool_call>"),
    ("hermes", hermes('{"name": "f", "arguments": {"a": 1,}}'), '{"a": 1,', "}}\n</tool_call>"),
    ("hermes", hermes('{"name": "f", "arguments": {"a": 01}}'), '{"a": ', "01}}\n</tool_call>"),
    ("hermes", hermes('{"name": "f", "arguments": {"a": ' + "[" * 80), '{"a": ' + "[" * 63,
     "[" * 17 + "\n</tool_call>"),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": ]', '{"a": ', "]"),
    ("pythonic", "[f(a=1, b=print())]", '{"a": 1, "b": ', "print())]"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "arguments", "rest"), BROKEN)
def test_a_call_that_breaks_off_is_content(form: str, text: str, arguments: str, rest: str) -> None:
    """Streamed, its beginning is out already; as a whole all of it is content."""
    expected: list[Piece] = [
        CallStart("", "f"),
        Arguments(arguments),
        CallBroken(text.removesuffix(rest)),
    ]
    if rest:
        expected.append(Content(rest))
    assert read(form, [text]) == read(form, text) == expected
    assert whole(form, text) == (text, [])


FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "<tool_", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"),
    *("<|tool_call|>", "<|python_start|>", "<|python_end|>", "```json", "```", ";", "text"),
    *(" ", "\n", "{", "}", "[", "]", "(", ")", ",", ":", "=", '"', "'", "\\", "\\u00e9", "\\ud8"),
    *("name", '"name": "f"', '"arguments": ', "{}", '{"a": "b"}', "1", "-1.5e3", "true", "None"),
    *(F, '{"name": "f", "arguments": {"a": "', "f", "f(", "get-weather(city='P', n=[1,])", "é"),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.data(),
)
def test_cuts_do_not_matter_and_nothing_is_lost(form: str, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = read(form, parts)
    assert pieces == read(form, [text]) == read(form, text)
    arguments = ""
    for piece in pieces:
        if isinstance(piece, Arguments):
            arguments += piece.text
        elif isinstance(piece, CallEnd):
            assert isinstance(json.loads(arguments), dict)
        elif isinstance(piece, CallStart):
            arguments = ""
    if not any(isinstance(piece, CallStart) for piece in pieces):
        assert pieces == ([Content(text)] if text else [])
    content, calls = whole(form, text)
    if not calls:
        assert "".join(content.split()) == "".join(text.split())


def test_arguments_are_handed_on_as_they_arrive() -> None:
    reader = ToolCallReader(FORMATS["hermes"], NAMES)
    assert reader.push('<tool_call>{"name": "f", ') == []
    start, first = reader.push('"arguments": {"a": "x')
    assert isinstance(start, CallStart) and first == Arguments('{"a": "x')
    assert reader.push("y") == [Arguments("y")]
    assert reader.push('"}') == [Arguments('"}')]
    assert reader.push("}</tool_") == [CallEnd()]
    assert reader.push("call>") == reader.finish() == []


def test_plain_text_waits_for_nothing() -> None:
    reader = ToolCallReader(FORMATS["llama3_json"], NAMES)
    for word in ("Hello", ", wor", "ld", " a < b"):
        assert reader.push(word) == [Content(word)]


def test_what_is_held_back_has_a_limit() -> None:
    reader = ToolCallReader(FORMATS["generic"], NAMES)
    start = '{"arguments": {"a": "'
    assert reader.push(start) == []
    held = out = 0
    for _ in range(MAX_HELD // 1000 + 2):
        held += 1000
        out += sum(len(piece.text) for piece in reader.push("x" * 1000))  # type: ignore[union-attr]
    assert out == len(start) + held


def test_calls_after_the_last_wanted_one_are_dropped() -> None:
    content, calls = whole("hermes", f"a {hermes(F, F, F)} b", max_calls=1)
    assert (content, calls) == ("ab", [("f", {"a": 1})])


def test_ids_are_new_and_short_where_templates_want_it() -> None:
    ids = {FORMATS["mistral"].new_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(one) == 9 and one.isalnum() for one in ids)
    assert FORMATS["hermes"].new_id().startswith("call_")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('{{ tools }}<tool_call>{"name"', "hermes"),
        ("{{ tools }}[AVAILABLE_TOOLS]...[TOOL_CALLS]", "mistral"),
        ('{"name": function name, "parameters": dictionary of argument name', "llama3_json"),
        ("<|python_tag|>", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("<|tool_call|>", "granite"),
        ("<tool_call><function=", "generic"),
        ("nothing", "generic"),
    ],
)  # fmt: skip
def test_the_template_tells_the_format(template: str, expected: str) -> None:
    assert tool_call_format("auto", template, takes_tools=True) is FORMATS[expected]
    assert tool_call_format("auto", template, takes_tools=False) is FORMATS["generic"]
    assert tool_call_format("pythonic", template, takes_tools=False) is FORMATS["pythonic"]
    assert tool_call_format("none", template, takes_tools=True) is None


def test_an_unknown_format_is_told() -> None:
    with pytest.raises(ConfigError, match="--tool-call-parser 'nope' is not one of auto, none"):
        tool_call_format("nope", "", takes_tools=True)
