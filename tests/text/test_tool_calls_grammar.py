"""What grammars of calls allow is read as calls whose arguments match their schemas: random walks
under the mask of the library that the engine uses, in every format.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Sequence

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from headrace.errors import InvalidRequestError
from headrace.text.grammar import GrammarRules, after_reasoning
from headrace.text.message_text import Message, MessageText, whole_message
from headrace.text.reasoning import FORMATS as REASONING
from headrace.text.reasoning import ReasoningReader
from headrace.text.tool_calls import FORMATS, ToolCallFormat
from headrace.text.tool_calls_grammar import CallRules, Function
from headrace.text.tool_calls_reader import ToolCallReader

EOS = "<|end|>"
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F'\"\\", None, 3]},
        "days": {"type": "integer", "minimum": -2, "maximum": 14},
        "fast": {"type": "boolean", "description": "x"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "many": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "odd-key": {"type": "null"},
    },
    "required": ["city", "fast"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {
        "node": {"$ref": "#/$defs/Node"},
        "again": {"$ref": "#/properties/size"},
        "size": {"type": "number"},
        "kind": {"type": ["boolean", "null"]},
    },
    "required": ["node"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"v": {"const": 1}, "next": {"$ref": "#/$defs/Node"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
ANY = {"properties": {"a": {}}}
FUNCTIONS = (
    Function("f", CITY, strict=True),
    Function("f.tree", TREE, strict=True),
    Function("any-thing", ANY, strict=False),
    Function("nothing", None, strict=True),
)
SCHEMAS = {function.name: function.schema for function in FUNCTIONS}


def _byte_name(byte: int) -> str:
    """How byte-level vocabularies call those bytes that are used here."""
    return chr(byte) if 0x21 <= byte <= 0x7E else chr(0x100 + byte)


class Spelling:
    """A vocabulary of bytes, some longer tokens and special ones."""

    def __init__(self, specials: Sequence[str]) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = FastTokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_tokens(['": {"', '", "', '{"name": "', "\n\n", "</", "tool", "\u00e9t\u00e9"])
        fast.add_tokens([AddedToken(text, special=True) for text in (EOS, *specials)])
        self.eos: int = fast.token_to_id(EOS)
        self.tokens = LLTokenizer(fast.to_str(), eos_token=self.eos)
        self.ids = {text: fast.token_to_id(text) for text in specials}
        self.fast = fast

    def tokens_of(self, text: str) -> list[list[int]]:
        """The text in the model's tokens, and in bytes alone."""
        in_bytes = "".join(map(_byte_name, text.encode()))
        return [self.fast.encode(text).ids, [self.fast.token_to_id(byte) for byte in in_bytes]]

    def text_of(self, ids: Sequence[int]) -> str:
        text: str = self.fast.decode(list(ids), skip_special_tokens=False)
        return text


@functools.cache
def _compiled(spelling: Spelling, grammar: str) -> LLMatcher:
    matcher = LLMatcher(spelling.tokens, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def is_allowed(spelling: Spelling, grammar: str, ids: list[int]) -> bool:
    """Whether the grammar allows these tokens and an end behind them."""
    matcher = _compiled(spelling, grammar).deep_copy()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def walk(
    spelling: Spelling, grammar: str, seed: int, *, phrases: Sequence[str] = (), limit: int = 4000
) -> str | None:
    """A text that the grammar allows; None if the walk does not come to an end.

    All tokens are drawn alike for a while, `phrases` where they are allowed now and then, and what
    closes things more often with time.
    """
    drawn = random.Random(seed)
    matcher = _compiled(spelling, grammar).deep_copy()
    closing = [spelling.fast.token_to_id(c) for c in "\"'}])"] + [spelling.eos]
    spelled = [ids for phrase in phrases for ids in spelling.tokens_of(phrase)]
    ids: list[int] = []
    while len(ids) < limit:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        assert len(allowed), spelling.text_of(ids)
        tokens = [int(drawn.choice(allowed))]
        ends = [index for index in closing if index in allowed]
        if ends and drawn.random() < (0.1 if len(ids) < 200 else 0.9):
            tokens = [drawn.choice(ends)]
        elif spelled and drawn.random() < 0.2:
            phrase = drawn.choice(spelled)
            tokens = phrase[: matcher.validate_tokens(phrase)] or tokens
        if tokens == [spelling.eos]:
            return spelling.text_of(ids)
        assert matcher.consume_tokens(tokens)
        ids += tokens
    return None


def read(form: ToolCallFormat, text: str, *, thinks: bool = False, begun: bool = False) -> Message:
    calls = ToolCallReader(form, SCHEMAS)
    reasoning = ReasoningReader(REASONING["think"], begun=begun) if thinks else None
    chain = MessageText(reasoning, calls)
    return whole_message(chain.push(text) + chain.finish())


def check(message: Message) -> None:
    for call in message.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


# Formats with the special tokens that models have for them, and without.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hermes": ("hermes", ()),
    "hermes, special": ("hermes", ("<tool_call>", "</tool_call>")),
    "llama3_json": ("llama3_json", ("<|python_tag|>",)),
    "mistral, array": ("mistral", ("[TOOL_CALLS]",)),
    "mistral, names": ("mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    "pythonic": ("pythonic", ()),
    "pythonic, special": ("pythonic", ("<|python_start|>", "<|python_end|>")),
    "granite": ("granite", ("<|tool_call|>",)),
    "generic": ("generic", ()),
}
SPELLINGS = {name: Spelling(specials) for name, (_, specials) in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)


def functions_for(form: ToolCallFormat) -> list[Function]:
    """Python's arguments cannot be held to all of a schema: there it may not be strict."""
    odd = Function("f", CITY, strict=not form.is_python)
    return [odd, *FUNCTIONS[1:]]


def grammar_of(kind: str, shape: Callable[[CallRules], str], *, several: bool = True) -> str:
    form = FORMATS[KINDS[kind][0]]
    rules = GrammarRules(SPELLINGS[kind].ids)
    calls = CallRules(rules, form, functions_for(form), several=several)
    return rules.source(shape(calls))


@every_kind
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shape", [CallRules.alone, CallRules.marked])
def test_nothing_but_calls(kind: str, several: bool, shape: Callable[[CallRules], str]) -> None:
    form = FORMATS[KINDS[kind][0]]
    grammar = grammar_of(kind, shape, several=several)
    counts, called = [], set()
    for seed in range(8):
        text = walk(SPELLINGS[kind], grammar, seed)
        assert text is not None
        message = read(form, text)
        assert (message.content, bool(message.calls)) == ("", True), text
        check(message)
        counts.append(len(message.calls))
        called |= {call.name for call in message.calls}
    assert (max(counts) > 1) is several
    assert len(called) > 2


FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|python_start|>",
    "<|tool_call|>", "```json", "{", "[", " ", "; ", '{"name": "f", "arguments": {"city": 1}}',
    "[f(city=1)]", "[ARGS]{", "<think>", "</think>",
)  # fmt: skip


def in_text(kind: str, *, several: bool) -> tuple[ToolCallFormat, str]:
    """The grammar, and the format that its texts are read with."""
    form = FORMATS[KINDS[kind][0]]
    form = dataclasses.replace(form, bare=form.bare and not form.fences)
    rules = GrammarRules(SPELLINGS[kind].ids)
    calls = CallRules(rules, form, functions_for(form), several=several)
    return form, rules.source(calls.in_text())


@every_kind
@pytest.mark.parametrize("several", [False, True])
def test_calls_in_text(kind: str, several: bool) -> None:
    """Whatever stands around them, what is read as a call is one."""
    form, grammar = in_text(kind, several=several)
    found, with_text = 0, 0
    for seed in range(30):
        text = walk(SPELLINGS[kind], grammar, seed, phrases=FRAGMENTS)
        assert text is not None
        message = read(form, text)
        check(message)
        assert several or len(message.calls) < 2
        found += len(message.calls)
        with_text += bool(message.calls and message.content)
    assert found > 2
    assert with_text


@every_kind
def test_no_wrong_call_in_a_text(kind: str) -> None:
    """However it is announced, and whatever stands before it."""
    form, grammar = in_text(kind, several=True)
    spelling = SPELLINGS[kind]
    key = form.arguments_key
    right, wrong = (json.dumps({"name": "f.tree", key: {"node": node}}) for node in ({"v": 1}, {}))
    pairs = [(right, wrong)]
    pairs += [(f"[{one}]", f"[{other}]") for one, other in pairs]
    pairs += [
        ('f.tree[ARGS]{"node": {"v": 1}}', 'f.tree[ARGS]{"node": {}}'),
        ('[f.tree(node={"v": 1})]', "[f.tree(node={})]"),
    ]
    allowed = 0
    for before in ("", " ", "\n\n", "Hm. ", "x" * 9):
        for begin in ("", *form.begin):
            for space in ("", "\n"):
                for end in ("", *(f"{space}{end}" for end in form.end)):
                    for bodies in pairs:
                        texts = [f"{before}{begin}{space}{body}{end}" for body in bodies]
                        if not any(read(form, text).calls for text in texts):
                            continue
                        counts = [
                            [is_allowed(spelling, grammar, ids) for ids in spelling.tokens_of(text)]
                            for text in texts
                        ]
                        allowed += sum(counts[0])
                        assert not any(counts[1]), texts[1]
    assert allowed >= 3


@pytest.mark.parametrize("thinking", [(), ("<think>", "</think>")], ids=["spelled", "special"])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic"])
def test_reasoning_comes_first_and_is_free(
    name: str, begun: bool, thinking: tuple[str, ...]
) -> None:
    form, spelling = FORMATS[name], Spelling(thinking)

    def grammar(shape: Callable[[CallRules], str]) -> str:
        rules = GrammarRules(spelling.ids)
        calls = CallRules(rules, form, FUNCTIONS[1:], several=True)
        return rules.source(after_reasoning(rules, shape(calls), REASONING["think"], begun=begun))

    thought = 0
    for seed in range(6):
        phrases = ("<think>", "</think>", "<tool_call>", "\n", "[", "{")
        for shape in (CallRules.alone, CallRules.in_text):
            text = walk(spelling, grammar(shape), seed, phrases=phrases)
            assert text is not None
            message = read(form, text, thinks=True, begun=begun)
            check(message)
            if shape is CallRules.alone:
                assert (message.content, bool(message.calls)) == ("", True), text
            thought += bool(message.reasoning)
    assert thought
    wrong = {
        "hermes": '<tool_call>\n{"name": "f.tree", "arguments": {}}\n</tool_call>',
        "llama3_json": '{"name": "f.tree", "parameters": {}}',
        "pythonic": "[f.tree()]",
    }[name]
    opening = "" if begun else "\n<think>"
    for text in (f"{opening}a</think>{wrong}", f"{opening}a</think>\n\n{wrong}"):
        assert [call.name for call in read(form, text, thinks=True, begun=begun).calls]
        for ids in spelling.tokens_of(text):
            assert not is_allowed(spelling, grammar(CallRules.in_text), ids)
    for ids in spelling.tokens_of(f"{opening}{wrong}</think>Yes"):
        assert is_allowed(spelling, grammar(CallRules.in_text), ids)


PLAIN = Spelling(())


def allows(form: str, functions: Sequence[Function], text: str, *, several: bool = True) -> bool:
    rules = GrammarRules({})
    start = CallRules(rules, FORMATS[form], functions, several=several).alone()
    return is_allowed(PLAIN, rules.source(start), PLAIN.fast.encode(text).ids)


ONE = '<tool_call>\n{"name": "f.tree", "arguments": {"node": {"v": 1}}}\n</tool_call>'
NONE = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "several", "allowed"),
    [
        (ONE, False, True),
        (f"{ONE}\n{NONE}", True, True),
        (f"{ONE}\n{NONE}", False, False),
        (f"{ONE} ", True, False),
        (f"Yes {ONE}", True, False),
        ("", True, False),
        (ONE.replace("f.tree", "f.tre"), True, False),
        (NONE.replace("{}}", '{"a": 1}}'), True, False),
    ],
)
def test_what_a_forced_answer_may_be(text: str, several: bool, allowed: bool) -> None:
    assert allows("hermes", FUNCTIONS, text, several=several) is allowed


@pytest.mark.parametrize("form", ["hermes", "pythonic"])
def test_schemas_that_cannot_be_kept_to(form: str) -> None:
    """A strict function's is refused; of another one as much is kept to as can be."""
    schema = {**CITY, "required": ["city"], "not": {"required": ["fast"]}}
    rules = GrammarRules({})
    with pytest.raises((InvalidRequestError, AssertionError), match=r"[\"']not[\"']"):
        calls = CallRules(rules, FORMATS[form], [Function("f", schema, strict=True)], several=True)
        is_allowed(PLAIN, rules.source(calls.alone()), [])
    functions = [Function("f", schema, strict=False)]
    good, bad = {
        "hermes": (ONE.replace(".tree", "").replace('"node": {"v": 1}', '"city": ' + city)
                   for city in ('"Bern"', "1")),
        "pythonic": (f"[f(city={city})]" for city in ('"Bern"', "1")),
    }[form]  # fmt: skip
    assert allows(form, functions, good)
    assert not allows(form, functions, bad)


PYTHON = [
    ('city="Bern", fast=True', True),
    ('city="Bern", fast=False, many=[true, false]', True),
    ("city='Bern', fast=False", False),  # maxLength: a string of JSON
    ('city="Bern", unit="C", fast=False', True),
    ("city=\"Bern\", unit='F\\'\"\\\\', fast=False, note='it\\'s'", True),
    ('city="Bern", unit=None, days=-2, fast=True, note=None', True),
    ('city="Bern", unit="K", fast=True', False),
    ('city="Bern", unit=3, fast=True', True),
    ('fast=True, city="Bern"', False),
    ('city="Bern"', False),
    ('city="Bern", fast=true', False),
    ('city="Bern", days=15, fast=True', False),
    ('city="Bern", fast=True, other=1', False),
    ("", False),
]


@pytest.mark.parametrize(("arguments", "allowed"), PYTHON)
def test_keyword_arguments(arguments: str, allowed: bool) -> None:
    schema = {**CITY, "properties": {**CITY["properties"]}}
    del schema["properties"]["odd-key"]
    function = Function("f", schema, strict=True)
    text = f"[f({arguments})]"
    assert allows("pythonic", [function], text) is allowed
    if allowed:
        [call] = read(FORMATS["pythonic"], text).calls
        jsonschema.validate(json.loads(call.arguments), schema)


def test_strict_keyword_arguments_need_names_that_python_has() -> None:
    odd = {"properties": {"odd-key": {}}, "required": ["odd-key"]}
    with pytest.raises(InvalidRequestError, match="'f' has an argument 'odd-key'"):
        allows("pythonic", [Function("f", odd, strict=True)], "")


def test_references_in_keyword_arguments() -> None:
    tree = {"v": 1, "next": {"v": 1}}
    function = [Function("g", TREE, strict=True)]
    assert allows("pythonic", function, f"[g(node={json.dumps(tree)}, again=1.5, size=2)]")
    assert not allows("pythonic", function, f"[g(node={json.dumps(tree)}, again=true)]")
    itself = {"properties": {"a": {"type": "integer"}, "more": {"$ref": "#"}}}
    function = [Function("g", itself, strict=True)]
    assert allows("pythonic", function, '[g(a=1, more={"a": 2, "more": {"a": 3}})]')
    assert not allows("pythonic", function, '[g(a=1, more={"a": 2, "more": {"a": "x"}})]')


def test_another_grammar_as_content() -> None:
    """Calls behind their marker, or else what the format of the answer asks for."""
    rules = GrammarRules({})
    calls = CallRules(rules, FORMATS["llama3_json"], FUNCTIONS[1:], several=True)
    content = rules.grammar('start: %json {"type": "object", "required": ["a"]}')
    source = rules.source(rules.rule(f"{calls.marked()} | {content}"))
    call = '<|python_tag|>{"name": "nothing", "parameters": {}}'
    for text, allowed in (
        (call, True),
        (f"{call}; {call.removeprefix('<|python_tag|>')}", True),
        ('{"a": 1}', True),
        ('{\n  "a": 1}', True),
        ('{"name": "nothing", "parameters": {}}', False),
        (f'{call}{{"a": 1}}', False),
    ):
        assert is_allowed(PLAIN, source, PLAIN.fast.encode(text).ids) is allowed
