"""Tokenizers from GGUF metadata against transformers (byte-level) and sentencepiece."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from headrace.errors import CheckpointError
from headrace.loading.gguf import GGUFFile
from headrace.text.gguf_tokenizer import gguf_tokenizer_settings, tokenizer_from_gguf

TEXTS = [
    "",
    " ",
    "Hello world!",
    "  two  spaces,\tand a tab ",
    "\n\n\r\n \n",
    "I'll we've IT'S don'T 'tis",
    "3.14159 1234567 v2.0-rc1 0x1F 50% $9.99",
    "def f(x: int) -> list[int]:\n    return [x**2 for _ in range(10)]  # ok\n",
    "Café déjà vu, naïve Ünïcödé; Straße",
    "日本語のテキスト。中文，한국어 العربية हिन्दी ไทย",
    "🎉👩‍👩‍👧‍👦 🏳️‍🌈",
    "zero\u200bwidth nb\u00a0sp \ufeff \u2028 \x00\x07",
    "camelCase HTTPServer snake_case kebab-case://path/to?x=1&y=2",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>a/b<file_sep>c",
    "not <|a special|> token <|im_start",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> dict[str, Any]:
    return GGUFFile(smollm2_path).metadata


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2)


def by_transformers(metadata: dict[str, Any], pre: str) -> Tokenizer:
    prefix = "tokenizer.ggml."
    known = {key.removeprefix(prefix): value for key, value in metadata.items()}
    tokenizer, _ = convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": known["model"],
            "pre_tokenizer_type": pre,
            **{key: known[key] for key in ("tokens", "token_type", "merges")},
        },
    )
    return tokenizer


class TestByteLevel:
    @pytest.mark.parametrize(
        "pre", ["smollm", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken"]
    )
    def test_encodes_as_transformers_does(self, smollm2: dict[str, Any], pre: str) -> None:
        metadata = smollm2 | {"tokenizer.ggml.pre": pre}
        ours, theirs = tokenizer_from_gguf(metadata), by_transformers(smollm2, pre)
        assert ours.get_vocab() == theirs.get_vocab()
        for text in TEXTS:
            ids = ours.encode(text).ids
            assert ids == theirs.encode(text).ids, text
            assert ours.decode(ids, skip_special_tokens=False) == text

    @settings(max_examples=100, deadline=None)
    # SmolLM2 has no tokens for some control characters, nor for the bytes that begin the higher
    # planes of Unicode: such characters are lost in its own tokenizer, too.
    @given(
        text=st.text(
            st.characters(
                max_codepoint=0xFFFF,
                exclude_categories=["Cs"],
                exclude_characters="\x04\x06\x13\x14\x16\x1d",
            )
        )
    )
    def test_any_text_survives(self, smollm2_tokenizer: Tokenizer, text: str) -> None:
        ids = smollm2_tokenizer.encode(text).ids
        assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text

    # What separates the families; `transformers` 5.23 takes SmolLM's digits for GPT-2's.
    @pytest.mark.parametrize(
        ("pre", "text", "pieces"),
        [
            ("smollm", "a ١٢ 34½", ["a", " ", "١", "٢", " ", "3", "4", "½"]),
            ("gpt-2", "a ١٢ 34", ["a", " ١٢", " 34"]),
            ("llama-bpe", "a 12345 IT'S", ["a", " ", "123", "45", " IT", "'S"]),
            ("smaug-bpe", "a 12345 IT'S", ["a", " ", "123", "45", " IT", "'S"]),
            ("qwen2", "a 123\n\nb", ["a", " ", "1", "2", "3", "\n\n", "b"]),
            ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
            ("default", "a=b 12345", ["a", "=", "b", " ", "123", "45"]),
        ],
    )
    def test_splits(self, smollm2: dict[str, Any], pre: str, text: str, pieces: list[str]) -> None:
        tokenizer = tokenizer_from_gguf(smollm2 | {"tokenizer.ggml.pre": pre})
        spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert [text[start:stop] for start, stop in spans] == pieces

    def test_qwen_composes_characters(self, smollm2: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_gguf(smollm2 | {"tokenizer.ggml.pre": "qwen2"})
        assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "\u00e9"

    def test_whole_words_precede_merges_in_llama_3(self, smollm2: dict[str, Any]) -> None:
        # Without a merge that leads there, only the vocabulary itself knows the word.
        metadata = smollm2 | {"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "llama-bpe"}
        token = smollm2["tokenizer.ggml.tokens"].index("hello")
        assert tokenizer_from_gguf(metadata).encode("hello").ids[-1] == token

    def test_special_and_user_defined_tokens(self, smollm2: dict[str, Any]) -> None:
        types = list(smollm2["tokenizer.ggml.token_type"])
        user_defined = smollm2["tokenizer.ggml.tokens"].index("<repo_name>")
        types[user_defined] = 4
        tokenizer = tokenizer_from_gguf(smollm2 | {"tokenizer.ggml.token_type": types})
        ids = tokenizer.encode("<|im_start|>x<repo_name>").ids
        assert [ids[0], ids[-1]] == [1, user_defined]
        assert tokenizer.decode(ids) == "x<repo_name>"

    @pytest.mark.parametrize(
        ("flags", "text_ids"),
        [
            ({}, [28120]),
            ({"add_bos_token": True}, [1, 28120]),
            ({"add_eos_token": True}, [28120, 2]),
            ({"add_bos_token": True, "add_eos_token": True}, [1, 28120, 2]),
            ({"pre": "llama-bpe"}, [1, 28120]),
            ({"pre": "llama-bpe", "add_bos_token": False}, [28120]),
        ],
    )
    def test_beginning_and_end_of_sequence(
        self, smollm2: dict[str, Any], flags: dict[str, Any], text_ids: list[int]
    ) -> None:
        metadata = dict(smollm2)
        del metadata["tokenizer.ggml.add_bos_token"]
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
        tokenizer = tokenizer_from_gguf(metadata)
        assert tokenizer.encode("hello").ids == text_ids
        assert tokenizer.encode("hello", add_special_tokens=False).ids == [28120]


class TestSettings:
    def test_real_file(self, smollm2: dict[str, Any]) -> None:
        settings = gguf_tokenizer_settings(smollm2)
        assert (settings.bos_token_id, settings.eos_token_id) == (1, 2)
        assert (settings.unk_token_id, settings.pad_token_id) == (0, 2)
        assert settings.stop_token_ids == (2,)
        assert (settings.add_bos, settings.add_eos) == (False, False)
        assert isinstance(settings.chat_template, str)
        assert "<|im_start|>" in settings.chat_template

    def test_ends_of_turn_and_named_templates(self, smollm2: dict[str, Any]) -> None:
        settings = gguf_tokenizer_settings(
            smollm2
            | {
                "tokenizer.ggml.eot_token_id": 5,
                "tokenizer.ggml.eom_token_id": 2,
                "tokenizer.chat_template": "d",
                "tokenizer.chat_template.tool_use": "t",
            }
        )
        assert settings.stop_token_ids == (2, 5)
        assert settings.chat_template == {"default": "d", "tool_use": "t"}

    def test_no_template(self, smollm2: dict[str, Any]) -> None:
        metadata = {key: value for key, value in smollm2.items() if "chat_template" not in key}
        assert gguf_tokenizer_settings(metadata).chat_template is None


def token_type(model: sentencepiece.SentencePieceProcessor, index: int) -> int:
    if model.is_unknown(index):
        return 2
    if model.is_control(index):
        return 3
    if model.is_byte(index):
        return 6
    return 4 if model.id_to_piece(index) == "<tool>" else 1


@pytest.fixture(scope="module")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    """A small model with Llama 2's settings, trained on a few words."""
    words = ["the", "engine", "request", "token", "cache", "block", "page", "prefill", "decode",
             "naïve", "cliché", "日本", "語", "a"]  # fmt: skip
    choose = random.Random(0)
    sentences = [
        " ".join(choose.choices(words, k=12)) + choose.choice([".", "!", "  x", ", 42"])
        for _ in range(400)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["[INST]"],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_metadata(sentencepiece_model: Any) -> dict[str, Any]:
    model = sentencepiece_model
    pieces = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in pieces],
        "tokenizer.ggml.scores": [model.get_score(index) for index in pieces],
        "tokenizer.ggml.token_type": [token_type(model, index) for index in pieces],
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }


class TestSentencePiece:
    def test_encodes_and_decodes_as_sentencepiece_does(
        self, sentencepiece_model: Any, sentencepiece_metadata: dict[str, Any]
    ) -> None:
        tokenizer = tokenizer_from_gguf(sentencepiece_metadata)
        choose = random.Random(1)
        alphabet = "the requsnt ockpagdïé日本語 .,!\n42🎉"
        noise = ["".join(choose.choices(alphabet, k=choose.randrange(40))) for _ in range(1000)]
        for text in [text for text in TEXTS if "\x00" not in text] + noise:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == sentencepiece_model.encode(text), text
            assert tokenizer.decode(ids) == sentencepiece_model.decode(ids) == text

    def test_beginning_of_sequence_by_default(self, sentencepiece_metadata: dict[str, Any]) -> None:
        ids = tokenizer_from_gguf(sentencepiece_metadata).encode("the").ids
        assert ids[0] == sentencepiece_metadata["tokenizer.ggml.bos_token_id"]
        off = sentencepiece_metadata | {"tokenizer.ggml.add_bos_token": False}
        assert tokenizer_from_gguf(off).encode("the").ids == ids[1:]

    def test_special_tokens_in_the_text(self, sentencepiece_metadata: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_gguf(sentencepiece_metadata)
        encoding = tokenizer.encode("[INST]the<tool>", add_special_tokens=False)
        assert encoding.tokens == ["[INST]", "▁the", "<tool>"]
        assert tokenizer.decode(encoding.ids) == "the<tool>"

    def test_without_the_dummy_space(self, sentencepiece_metadata: dict[str, Any]) -> None:
        tokenizer = tokenizer_from_gguf(
            sentencepiece_metadata | {"tokenizer.ggml.add_space_prefix": False}
        )
        encoding = tokenizer.encode("the the", add_special_tokens=False)
        assert "".join(encoding.tokens) == "the▁the"
        assert tokenizer.decode(encoding.ids) == "the the"
        assert tokenizer.decode(tokenizer.encode(" x").ids) == " x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; known: 'gpt2', 'llama'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "dbrx2"}, "tokenizer.ggml.pre is 'dbrx2'; known: smollm, gpt-2"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or not a list of strings"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a c"]}, "vocabulary and merges do not fit together"),
        ({"merges": ["ab"]}, "vocabulary and merges do not fit together"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type is not a list of 3 numbers"),
        ({"token_type": ["x"] * 3}, "tokenizer.ggml.token_type is not a list of 3 numbers"),
        ({"bos_token_id": 3}, "tokenizer.ggml.bos_token_id is 3, outside the vocabulary of 3"),
        ({"eos_token_id": "a"}, "tokenizer.ggml.eos_token_id is 'a', outside the vocabulary"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores is not a list of 3 numbers"),
    ],
)
def test_inconsistent_metadata_names_the_key(changes: dict[str, Any], message: str) -> None:
    metadata = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | changes
    if metadata["model"] == "llama":
        del metadata["merges"]
    present = {f"tokenizer.ggml.{k}": value for k, value in metadata.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(present)
