"""Incremental decoding gives what decoding at once gives, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.detokenizer import Detokenizer
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

TEXTS = st.text(max_size=40) | st.text("aehlorw ,.!你é👩\u200d\U0001f3fd", max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(ids=st.lists(st.integers(0, 262), max_size=30), skip=st.booleans())
@settings(deadline=None)
def test_any_byte_level_ids(kinds: dict[str, Tokenizer], ids: list[int], skip: bool) -> None:
    tokenizer = kinds["byte_level"]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(tokenizer, ids, skip=skip)) == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "sentencepiece_plain"])
@given(text=TEXTS)
@settings(deadline=None)
def test_any_text(kinds: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@given(ids=st.lists(st.integers(1, 10), max_size=20))
@settings(deadline=None)
def test_a_decoder_that_looks_at_neighbours(kinds: dict[str, Tokenizer], ids: list[int]) -> None:
    tokenizer = kinds["wordpiece"]
    assert not tokenizer.bytes_are_exact
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_split_character_comes_with_its_last_token(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    ids = tokenizer.encode("👍!", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ["", "", "", "👍", "!", ""]


def test_an_unfinished_character_shows_at_the_end(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    ids = tokenizer.encode("a👍", add_special_tokens=False)[:-1]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_only_the_dummy_space_is_dropped(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentencepiece"]
    ids = tokenizer.encode("  he", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == "  he"


@given(text=TEXTS)
@settings(deadline=None, max_examples=50)
def test_the_real_tokenizer(smollm2: TextProcessor, text: str) -> None:
    ids = smollm2.tokenizer.encode(text)
    assert "".join(pieces(smollm2.tokenizer, ids)) == smollm2.tokenizer.decode(ids)
