"""Chat templates: as Hugging Face renders them, and harmless when they mean harm."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.text.chat_template import ChatTemplate
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <é> \n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]

# In the manner of Llama 2, Mistral, ChatML, Llama 3 and reasoning models, with what they use.
TEMPLATES = {
    "inst": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + ('<<SYS>>' + system + '<</SYS>>' if loop.first and system else '')"
        " + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks": """{%- for message in messages %}
    {%- if loop.index > 3 %}
        {%- break %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}"
        "{% set ns.n = ns.n + m.content|length %}{{ m | tojson }}{% endfor %}{{ ns.n }}"
        "{% if tools is not none %}T{% endif %}{{ thinking | default('no') }}"
        "{% for key, value in {'a': 1}.items() %}{{ key ~ value }}{% endfor %}"
        "{% macro f(x) %}{{ x * 2 }}{% endmacro %}{{ f('ab') }}{{ [1, 2] | tojson(indent=2) }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    variables: dict[str, Any] = {**special, "thinking": "yes"}
    theirs = render_jinja_template(
        conversations=[CHAT],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        **variables,
    )[0]
    template = ChatTemplate(TEMPLATES[name], special_tokens=special)
    ours = template.render(CHAT, add_generation_prompt=prompt, kwargs={"thinking": "yes"})
    assert ours == theirs[0]


def test_smollm2(smollm2: TextProcessor) -> None:
    text = smollm2.render_chat([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(smollm2.tokenizer.eos_id or -1) == 2


def test_the_final_message_is_continued(smollm2: TextProcessor) -> None:
    messages = [*CHAT[:2], {"role": "assistant", "content": "The answer "}]
    text = smollm2.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer ")
    with pytest.raises(InvalidRequestError, match="exclude each other") as caught:
        smollm2.render_chat(messages, continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    with pytest.raises(InvalidRequestError, match="changes it"):
        ChatTemplate("nothing").render(
            messages, add_generation_prompt=False, continue_final_message=True
        )


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(InvalidRequestError, match="Roles must alternate") as caught:
        ChatTemplate(TEMPLATES["inst"]).render([{"role": "assistant", "content": ""}])
    assert caught.value.param == "messages"


def test_the_developer_role_is_the_system_role_where_unknown() -> None:
    message = [{"role": "developer", "content": ""}]
    assert ChatTemplate("{{ messages[0].role }}").render(message) == "system"
    knows = "{{ 'knows developer' if 0 }}{{ messages[0].role }}"
    assert ChatTemplate(knows).render(message) == "developer"


HOSTILE = {
    "endless loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 1000000000 }}",
    "repetition of a list": "{{ [0] * 1000000000 }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "much text": "{% set a = 'x' * 100000 %}{% for b in range(1000) %}{{ a }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "absent attributes": "{{ messages[0].nope.nope }}",
    "absent elements": "{{ messages[9]['role'] }}",
    "a type error": "{{ messages[0].role + 1 }}",
    "a division by zero": "{{ 1 / 0 }}",
    "unknown files": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_fails_only_its_request(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    with pytest.raises(InvalidRequestError, match="does not take these messages"):
        template.render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}", "{{ x | nofilter }}"])
def test_a_template_that_does_not_compile_is_told_at_load(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate(source)


def test_kwargs_cannot_replace_what_the_server_sets() -> None:
    with pytest.raises(InvalidRequestError, match="must not set 'messages'"):
        ChatTemplate("").render(CHAT, kwargs={"messages": []})


def test_of_several_templates_the_default_is_used(kinds: dict[str, Tokenizer]) -> None:
    several = {"tool_use": "T", "default": "D"}
    assert TextProcessor(kinds["byte_level"], several).render_chat(CHAT) == "D"
    with pytest.raises(CheckpointError, match="none named 'default'"):
        ChatTemplate({"a": "", "b": ""})


def test_a_model_without_a_template_says_where_to_go(kinds: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        TextProcessor(kinds["byte_level"]).render_chat(CHAT)
