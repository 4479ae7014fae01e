"""Requests with grammars among others: masks, forced tokens, preemption, replay, refusals."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from headrace.engine import grammar as grammar_module
from headrace.engine.client import FinishReason
from headrace.engine.grammar_trial import GrammarTrial, Verdict

VOCAB_SIZE, EOS = 1000, 999  # of the pretend model

DIGITS = "start: /[0-9]{3,8}/"
JSON = "start: %json " + json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False, "key_separator": ": "},
    }
)


def make_tokenizer() -> Tokenizer:
    """256 bytes, words of digits and letters, and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "na", "me", "ag", "ame", '":']
    fast = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    more = [f"{number:03}" for number in range(EOS - len(pieces))]
    fast.add_tokens([AddedToken(text, normalized=False) for text in more])
    fast.add_tokens([AddedToken("<end>", special=True)])
    assert fast.get_vocab_size() == VOCAB_SIZE and fast.token_to_id("<end>") == EOS
    return fast


TOKENIZER = make_tokenizer()


def text_of(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were tried out: no process is started here, and none is refused."""
    tried: list[str] = []

    def verdict(trial: GrammarTrial, grammar: str) -> Verdict:
        tried.append(grammar)
        return Verdict("")

    monkeypatch.setattr(GrammarTrial, "verdict", verdict)
    return tried


@pytest.fixture
def harness(make_harness: Callable[..., Any], trials: list[str]) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        made = make_harness(**options)
        made.engine.use_tokenizer(TOKENIZER.to_str())
        return made

    return make


@pytest.fixture(params=[False, True], ids=["in_order", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_outputs_fit_and_others_do_not_notice(
    harness: Callable[..., Any], expected: Callable[..., list[int]], overlaps: bool
) -> None:
    one = harness(overlaps=overlaps)
    one.add("digits", [5, 6, 7], grammar=DIGITS, max_tokens=20)
    one.add("free", [1, 2, 3], max_tokens=12)
    one.add("json", [4, 4], grammar=JSON, max_tokens=50)
    one.run()
    assert one.tokens["free"] == expected([1, 2, 3], 12)
    assert re.fullmatch(r"[0-9]{3,8}", text_of(one.tokens["digits"]).removesuffix("<end>"))
    assert one.ended["json"].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    if one.ended["json"].finish_reason is FinishReason.STOP:
        assert set(json.loads(text_of(one.tokens["json"]))) == {"name", "age"}
    assert text_of(one.tokens["json"]).startswith('{"name": "')


def test_overlap_changes_nothing(harness: Callable[..., Any]) -> None:
    tokens = []
    for overlaps in (False, True):
        one = harness(overlaps=overlaps)
        for index in range(6):
            one.add(f"r{index}", [index, 3, 5], grammar=JSON if index % 2 else "", max_tokens=24)
        one.run()
        tokens.append(one.tokens)
    assert tokens[0] == tokens[1]


def test_preemption_and_little_memory_change_nothing(
    harness: Callable[..., Any], overlaps: bool
) -> None:
    tokens = []
    for num_blocks in (64, 14):
        one = harness(overlaps=overlaps, num_blocks=num_blocks, max_num_seqs=4, budget=8)
        for index in range(4):
            one.add(f"r{index}", [index + 1] * 5, grammar=JSON, max_tokens=26)
        one.run()
        tokens.append(one.tokens)
        assert (one.scheduler.num_preemptions > 0) == (num_blocks == 14)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("taken", [1, 4, 9])
def test_a_replay_goes_on_where_the_output_ended(harness: Callable[..., Any], taken: int) -> None:
    whole = harness()
    whole.add("a", [3, 1], grammar=JSON, max_tokens=30)
    outputs: list[int] = []
    while len(outputs) < taken:
        whole.step()
        outputs = list(whole.tokens["a"])
    whole.run()
    again = harness()
    again.add("a", [3, 1], grammar=JSON, max_tokens=30, resume=outputs)
    again.run()
    assert outputs + again.tokens["a"] == whole.tokens["a"]


def test_forced_tokens_take_no_steps_of_their_own(harness: Callable[..., Any]) -> None:
    jumping, plain = harness(), harness()
    jumping.add("a", [3, 1], grammar='start: "abcdefgh" /[0-9]/ "ijkl"', max_tokens=30)
    plain.add("a", [3, 1], grammar='start: "abcdefgh" /[0-9]/ "ijkl"', max_tokens=30, logprobs=0)
    jumping.run()
    plain.run()
    assert re.fullmatch("abcdefgh[0-9]ijkl", text_of(jumping.tokens["a"]))
    assert jumping.tokens["a"] == plain.tokens["a"]
    assert len(plain.logprobs["a"]) == len(plain.tokens["a"]), "each has its log-probability"
    assert len(jumping.runner.batches) == 1 and len(plain.runner.batches) > 10


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_cut_what_is_forced(harness: Callable[..., Any], max_tokens: int) -> None:
    one = harness()
    one.add("a", [3, 1], grammar='start: "abc" /[0-9]/ "defg"', max_tokens=max_tokens)
    one.run()
    text = text_of(one.tokens["a"])
    assert re.fullmatch("abc[0-9]defg", text + "abc0defg"[len(text) :])
    assert len(one.tokens["a"]) == min(max_tokens, 8)
    done = max_tokens >= 8
    assert one.ended["a"].finish_reason is (FinishReason.STOP if done else FinishReason.LENGTH)


def test_an_end_token_comes_where_the_grammar_may_end(harness: Callable[..., Any]) -> None:
    one = harness()
    one.add("only", [3], grammar="start: /x{0,3}/", max_tokens=9, allowed_token_ids=[EOS])
    one.add("long", [3], grammar="start: /x{0,5}/", max_tokens=9, min_tokens=4)
    one.add("ever", [3], grammar="start: /x{0,5}/", max_tokens=9, ignore_eos=True)
    one.add("short", [3], grammar="start: /x{2}/", max_tokens=9, min_tokens=5)
    one.run()
    assert text_of(one.tokens["long"][:4]) == "xxxx"
    assert text_of(one.tokens["ever"]) == "xxxxx"
    assert text_of(one.tokens["short"]) == "xx", "the grammar's end comes first"
    for name in ("long", "ever", "short"):
        assert one.ended[name].finish_reason is FinishReason.STOP
        stop = one.ended[name].stop_token_id
        assert stop is None or one.tokens[name][-1] == stop == EOS


def test_a_grammar_is_compiled_once(harness: Callable[..., Any], trials: list[str]) -> None:
    one = harness()
    for index in range(5):
        one.add(f"r{index}", [index + 1], grammar=DIGITS, max_tokens=9)
    one.run()
    one.add("later", [8], grammar=DIGITS, max_tokens=9)
    one.run()
    assert trials == [DIGITS] and len(one.ended) == 6


@pytest.mark.parametrize(
    "grammar", ["start: (((", 'start: %json {"type": "nothing"}', "start: x", "start: /(/"]
)
def test_a_bad_grammar_ends_its_own_request_only(
    harness: Callable[..., Any], expected: Callable[..., list[int]], grammar: str
) -> None:
    one = harness()
    one.add("free", [1, 2, 3], max_tokens=5)
    one.add("bad", [4], grammar=grammar, max_tokens=5)
    one.run()
    assert one.tokens["free"] == expected([1, 2, 3], 5)
    assert one.ended["bad"].finish_reason is FinishReason.REFUSED
    assert one.ended["bad"].error and one.ended["bad"].record is not None


def test_a_grammar_that_fails_on_the_way_ends_its_own_request_only(
    harness: Callable[..., Any], expected: Callable[..., list[int]]
) -> None:
    one = harness()
    one.add("free", [1, 2, 3], max_tokens=20)
    one.add("bad", [4], grammar='start: a\na: "x" a', max_tokens=20)
    one.run()
    assert one.tokens["free"] == expected([1, 2, 3], 20)
    assert one.ended["bad"].finish_reason is FinishReason.REFUSED
    assert "Too many items" in (one.ended["bad"].error or "")


def test_a_bug_in_the_library_ends_its_own_request_only(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trial: GrammarTrial, grammar: str) -> Verdict:
        raise RuntimeError("a bug")

    monkeypatch.setattr(GrammarTrial, "verdict", fail)
    one = harness()
    one.add("a", [4], grammar=DIGITS, max_tokens=5)
    one.add("free", [1, 2, 3], max_tokens=5)
    one.run()
    assert one.ended["a"].finish_reason is FinishReason.REFUSED
    assert "RuntimeError" in (one.ended["a"].error or "")


def test_an_engine_without_a_tokenizer_refuses(
    make_harness: Callable[..., Any], trials: list[str]
) -> None:
    one = make_harness()
    one.add("a", [4], grammar=DIGITS, max_tokens=5)
    one.run()
    assert one.ended["a"].finish_reason is FinishReason.REFUSED


def test_requests_whose_grammar_takes_long_can_be_aborted_and_time_out(
    harness: Callable[..., Any],
    expected: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(trial: GrammarTrial, grammar: str) -> Verdict:
        time.sleep(0.3)
        return Verdict("")

    monkeypatch.setattr(GrammarTrial, "verdict", wait)
    one = harness()
    one.engine._grammars._time_limit = 0.1
    one.add("slow", [4], grammar=DIGITS, max_tokens=5)
    one.add("left", [4], grammar=DIGITS, max_tokens=5)
    one.engine.abort("left")
    one.add("free", [1, 2, 3], max_tokens=5)
    one.run()
    assert one.tokens["free"] == expected([1, 2, 3], 5)
    assert one.ended["left"].finish_reason is FinishReason.ABORT
    assert one.ended["slow"].finish_reason is FinishReason.REFUSED
    assert "0.1 s" in (one.ended["slow"].error or "")


# --- the trial process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial() -> Any:
    one = GrammarTrial(TOKENIZER.to_str(), VOCAB_SIZE, [EOS])
    yield one
    one.close()


CHAIN = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} "a"' for i in range(3000)) + '\nr3000: "z"'


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (JSON, ""),
        (DIGITS, ""),
        ('start: "a"', ""),
        ('start: %json {"type": "integer", "multipleOf": 9999991}', "too much time or memory"),
        (CHAIN, "too much time or memory"),
        ('start: %json {"$ref": "#"}', "nothing fits"),
        ('start: a\na: "x" a', "Too many items"),
        ("start: (", "Expected token"),
        (JSON, ""),
    ],
)
def test_hostile_grammars_are_found_out(trial: GrammarTrial, grammar: str, says: str) -> None:
    verdict = trial.verdict(grammar)
    assert verdict.is_final
    assert says in verdict.error if says else not verdict.error


def test_a_trial_without_time_may_be_repeated(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engine.grammar_trial.WALL_SECONDS", 0.0)
    verdict = trial.verdict('start: %json {"type": "integer", "multipleOf": 9999991}')
    assert verdict.error and not verdict.is_final
    monkeypatch.undo()
    assert not trial.verdict(DIGITS).error


def test_messages_leave_out_what_nobody_can_read() -> None:
    message = grammar_module._message("at 1(8): bad\n" + "x" * 300 + "\n<state>\nTokens")
    assert message == "at 1(8): bad"
