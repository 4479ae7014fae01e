"""The tokenizer wrapper: special tokens, flags, and the bytes of each token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from headrace.errors import CheckpointError
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

TEXTS = ["hello world", "  he  llo", "héllo 你好 👩‍👩‍👧", "", " ", "\n\t", "a<|im_end|>b"]


def small_fast() -> FastTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "sentencepiece_plain"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_concatenation_of_its_tokens_bytes(
    kinds: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    raw = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    if tokenizer.strips_first_space:
        raw = raw.removeprefix(b" ")
    assert raw.decode() == tokenizer.decode(ids, skip_special_tokens=False)


def test_encode_batch_equals_encode(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_tokens_are_known_and_skipped(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert {tokenizer.bos_id, tokenizer.eos_id} < tokenizer.special_ids
    ids = tokenizer.encode("he<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "he<|im_end|>"


def test_part_of_a_character_is_named_by_its_bytes(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte_level"]
    first, *_ = tokenizer.encode("你", add_special_tokens=False)
    assert tokenizer.token_string(first) == "bytes:\\xe4"
    assert tokenizer.token_bytes(first) == b"\xe4"


def test_ids_beyond_the_vocabulary_are_nothing(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        assert tokenizer.token_piece(tokenizer.vocab_size + 7) == ""
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


def test_add_bos_token_adds_what_tokenizer_json_does_not() -> None:
    fast = small_fast()
    fast.add_tokens([AddedToken("<s>", special=True)])
    config = {"bos_token": "<s>", "add_bos_token": True}
    added = Tokenizer(fast, config)
    assert added.encode("a")[0] == added.bos_id
    assert added.encode_batch(["a", "b"])[1][0] == added.bos_id
    assert added.bos_id not in added.encode("a", add_special_tokens=False)

    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert Tokenizer(fast, config).encode("a").count(256) == 1


def test_added_tokens_of_the_config_are_added_under_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    small_fast().save(str(path))
    entries = {"257": {"content": "<b>", "special": False}, "256": {"content": "<a>", "special": 1}}
    config = {"added_tokens_decoder": entries, "eos_token": "<a>"}
    tokenizer = TextProcessor.from_tokenizer_json(path, config=config).tokenizer
    assert tokenizer.encode("<a><b>") == [256, 257]
    assert tokenizer.special_ids == {256}
    assert tokenizer.eos_id == 256


def test_files_of_two_models_are_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    small_fast().save(str(path))
    config = {"added_tokens_decoder": {"999": {"content": "<a>"}}}
    with pytest.raises(CheckpointError, match="not of the same model"):
        TextProcessor.from_tokenizer_json(path, config=config)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": {"type": "Nonsense"}})])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.from_file(path)
    with pytest.raises(CheckpointError, match="absent"):
        Tokenizer.from_file(tmp_path / "absent")


def test_the_longest_token_bounds_the_number_of_tokens(smollm2: TextProcessor) -> None:
    tokenizer = smollm2.tokenizer
    for text in ("hello " * 50, " " * 500, "x" * 500):
        assert len(tokenizer.encode(text)) >= len(text) / tokenizer.longest_token


def test_smollm2_reads_its_special_tokens(smollm2: TextProcessor) -> None:
    assert smollm2.tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert smollm2.tokenizer.eos_id == 2
    assert smollm2.tokenizer.bytes_are_exact


def test_spellings_of_words(kinds: dict[str, Tokenizer], smollm2: TextProcessor) -> None:
    for tokenizer in (*kinds.values(), smollm2.tokenizer):
        found = tokenizer.spellings(["cat", " cat", "the cat sat"])
        alone = tokenizer.encode("cat", add_special_tokens=False)
        after = tokenizer.encode(" cat", add_special_tokens=False)
        assert alone in found and after in found
        assert len(found) == len({tuple(ids) for ids in found}) <= 4
        assert tokenizer.spellings([]) == []
    assert smollm2.tokenizer.decode(smollm2.tokenizer.spellings(["cat"])[0]).strip() == "cat"
