"""Small tokenizers of each kind, and the real one of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, WordPiece

from headrace.loading.gguf import GGUFFile
from headrace.text.processor import TextProcessor
from headrace.text.tokenizer import Tokenizer

SPECIALS = ("<s>", "</s>", "<|im_end|>")


def byte_level() -> FastTokenizer:
    """GPT-2's kind: one token per byte, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©")]
    pieces = [*alphabet, *(left + right for left, right in merges)]
    fast = FastTokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def sentencepiece(*, dummy_space: bool = True) -> FastTokenizer:
    """Llama 2's kind: U+2581 for a space, byte tokens for what the vocabulary lacks."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdehlorw,.!"]
    merges = [("h", "e"), ("l", "l"), ("\u2581", "w")]
    pieces += [left + right for left, right in merges]
    model = BPE(
        {piece: index for index, piece in enumerate(pieces)},
        merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    fast = FastTokenizer(model)
    replace = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_space:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        fast.normalizer = replace
    fast.decoder = decoders.Sequence(steps)
    return fast


def wordpiece() -> FastTokenizer:
    """BERT's kind, whose decoder looks at neighbours."""
    pieces = ["[UNK]", "hello", "world", "##s", "##ly", "kind", ",", "!"]
    model = WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    fast = FastTokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return fast


def wrapped(fast: FastTokenizer) -> Tokenizer:
    fast.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return Tokenizer(fast, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


@pytest.fixture(scope="session")
def kinds() -> dict[str, Tokenizer]:
    return {
        "byte_level": wrapped(byte_level()),
        "sentencepiece": wrapped(sentencepiece()),
        "sentencepiece_plain": wrapped(sentencepiece(dummy_space=False)),
        "wordpiece": wrapped(wordpiece()),
    }


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> TextProcessor:
    return TextProcessor.from_gguf(GGUFFile(smollm2_path).metadata)
