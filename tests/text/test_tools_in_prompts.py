"""Tools, calls and results on their way through a chat template, or around it."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.config import option_specs
from headrace.text.chat_template import ChatTemplate
from headrace.text.processor import TextProcessor
from headrace.text.reasoning import FORMATS as REASONING_FORMATS
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls import FORMATS

TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def conversation(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("arguments | tojson", '{"b": 1, "a": "é"}'),
        ("arguments.b + 1", "2"),
        ("arguments is mapping", "True"),
        ("arguments is string", "False"),
        ("arguments", '{"b":1,"a":"é"}'),
        ("'x' + arguments + 'y'", 'x{"b":1,"a":"é"}y'),
        ("'x' ~ arguments", 'x{"b":1,"a":"é"}'),
        ("arguments.items() | list", "[('b', 1), ('a', 'é')]"),
    ],
)
def test_arguments_are_an_object_and_where_needed_their_text(
    expression: str, expected: str
) -> None:
    name = "{% set arguments = messages[0].tool_calls[0].function.arguments %}"
    source = f"{name}{{{{ {expression} }}}}"
    assert ChatTemplate(source).render(conversation('{"b":1,"a":"é"}')) == expected


@pytest.mark.parametrize("arguments", ["no json", "[1]", '{"a": ', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments }}"
    assert ChatTemplate(source).render(conversation(arguments)) == arguments


def test_tools_go_through_the_template_made_for_them() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "{{ tools[0].function.name }}"})
    assert template.takes_tools
    assert template.render([], tools=TOOLS) == "f"
    assert template.render([]) == "D"


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("{{ tools }}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}", True),
        ("{{ messages }}", False),
        ("no {tools}", False),
    ],
)
def test_whether_a_template_takes_tools(source: str, takes: bool) -> None:
    assert ChatTemplate(source).takes_tools is takes


def test_a_template_that_teaches_xml_is_asked_for_json(kinds: dict[str, Tokenizer]) -> None:
    source = (
        "{{ tools }}<function=f>{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    text = TextProcessor(kinds["byte_level"], source)
    assert text.tool_calls is FORMATS["generic"]
    prompt = text.render_chat([{"role": "user", "content": "Hi"}], tools=TOOLS)
    assert prompt.startswith("None<function=f>system:You may call") and prompt.endswith("user:Hi;")


def test_smollm2_has_no_place_for_tools(smollm2: TextProcessor) -> None:
    assert smollm2.tool_calls is FORMATS["generic"]
    assert smollm2.reasoning is None
    prompt = smollm2.render_chat([{"role": "user", "content": "Hi"}], tools=TOOLS)
    assert '{"name": "f", "parameters": {"type": "object"}}' in prompt
    assert prompt.count("<|im_start|>system") == 1


def test_the_options_name_every_format() -> None:
    specs = {spec.name: spec for spec in option_specs()}
    assert specs["tool_call_parser"].choices == ("auto", "none", *FORMATS)
    assert specs["reasoning_parser"].choices == ("auto", "none", *REASONING_FORMATS)


def test_special_tokens_that_markers_need_are_found(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    shown = tokenizer.special_ids_of(["<|im_end|>", "h", "absent"])
    assert [tokenizer.token_piece(index) for index in shown] == ["<|im_end|>"]


def test_ids_from_elsewhere_fit_the_templates_that_want_nine_characters(
    kinds: dict[str, Tokenizer],
) -> None:
    source = (
        "{{ tools }}{#[TOOL_CALLS]#}{% for m in messages %}"
        "{{ (m.tool_calls or [{}])[0].id }}{{ m.tool_call_id }};{% endfor %}"
    )
    text = TextProcessor(kinds["byte_level"], source)
    assert text.tool_calls is FORMATS["mistral"]

    def rendered(call_id: str) -> list[str]:
        [call] = conversation("{}")
        call["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "content": "x", "tool_call_id": call_id}
        return text.render_chat([call, result]).removeprefix("None").split(";")[:2]

    assert rendered("abcDEF123") == ["abcDEF123"] * 2
    made, other = rendered("call_0123456789abcdef"), rendered("call_1")
    assert made[0] == made[1] != other[0]
    assert all(len(one) == 9 and one.isalnum() for one in made + other)
