"""Text to token ids and back, for the formats that `tokenizers` reads.

Knows the bytes that each token stands for, which is what streaming and log-probabilities need;
knows nothing of requests or chat.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from headrace.errors import CheckpointError

_SPECIAL_NAMES = ("bos", "eos", "unk", "pad")


class Tokenizer:
    """A `tokenizers.Tokenizer` and what a server needs beside it.

    `config` is the content of tokenizer_config.json (or an equal mapping): its special tokens,
    `added_tokens_decoder` and `add_bos_token` are honoured, everything else is only kept.
    """

    def __init__(self, fast: FastTokenizer, config: Mapping[str, Any] | None = None) -> None:
        self.config: dict[str, Any] = dict(config or {})
        self._fast = fast
        fast.no_padding()
        fast.no_truncation()
        _add_missing_tokens(fast, self.config.get("added_tokens_decoder"))
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in fast.get_added_tokens_decoder().items() if token.special
        )
        self.special_tokens: dict[str, str] = {
            f"{name}_token": text
            for name in _SPECIAL_NAMES
            if (text := _token_text(self.config.get(f"{name}_token"))) is not None
        }
        self.bos_id = self._special_id("bos")
        self.eos_id = self._special_id("eos")
        self._leading_ids = self._missing_bos()
        self._rule = _decoding_rule(fast)
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        """What Detokenizer has found out: the texts of tokens that are whole characters."""

    @classmethod
    def from_file(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read tokenizer.json. Raises CheckpointError if it is missing or unreadable."""
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(f"{path} is not a readable tokenizer.json: {error}") from error
        return cls(fast, config)

    def to_json(self) -> str:
        """The content of a tokenizer.json, with all that was added."""
        content: str = self._fast.to_str()
        return content

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # The batch of one does without offsets: a fifth less time.
        encodings = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return [*self._leading_ids, *ids] if add_special_tokens and self._leading_ids else ids

    def encode_within(
        self,
        texts: Sequence[str],
        limit: int | None,
        *,
        keeps_end: bool = False,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """At most `limit` tokens of each text: what is too much of it is left out, special tokens
        stay."""
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        leading: list[int] = self._leading_ids if add_special_tokens else []
        special = self._fast.num_special_tokens_to_add(False) if add_special_tokens else 0
        found: list[list[int]] = []
        for encoding in encodings:
            if limit is not None:
                room = max(limit - special - len(leading), 0)
                encoding.truncate(room, direction="left" if keeps_end else "right")
            ids: list[int] = self._fast.post_process(encoding, None, add_special_tokens).ids
            found.append([*leading, *ids][:limit])
        return found

    def encode_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        limit: int | None = None,
        *,
        max_second: int | None = None,
        keeps_end: bool = False,
    ) -> list[tuple[list[int], int | None]]:
        """Two texts as one sequence with special tokens, and where the second one begins, if the
        tokenizer gives the two different types.

        Of more than `limit` tokens the longer text loses its own, until both are of one length.
        `max_second` cuts the second text before that.
        """
        texts = [text for pair in pairs for text in pair]
        encodings = iter(self._fast.encode_batch_fast(texts, add_special_tokens=False))
        direction = "left" if keeps_end else "right"
        found: list[tuple[list[int], int | None]] = []
        for first, second in zip(encodings, encodings, strict=True):
            if max_second is not None:
                second.truncate(max_second, direction=direction)
            if limit is not None:
                room = max(limit - self._fast.num_special_tokens_to_add(True), 0)
                most_first, most_second = _shares(len(first), len(second), room)
                first.truncate(most_first, direction=direction)
                second.truncate(most_second, direction=direction)
            whole = self._fast.post_process(first, second, True)
            types: list[int] = whole.type_ids
            found.append((whole.ids[:limit], types.index(1) if 1 in types else None))
        return found

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        leading = self._leading_ids if add_special_tokens else []
        return [[*leading, *encoding.ids] for encoding in encodings]

    def spellings(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word as it begins a text, and as it follows a space."""
        if not words:
            return []
        texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
        found = {tuple(ids) for ids in self.encode_batch(texts, add_special_tokens=False) if ids}
        return sorted(map(list, found))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary stand for nothing."""
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_string(self, token_id: int) -> str:
        """The token as its text, or `bytes:\\xe2\\x80` when it is part of a character, which is
        how OpenAI's completions name such tokens."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id outside of it."""
        return self._fast.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text (a leading space included)."""
        raw = self._bytes.get(token_id)
        if raw is None:
            raw = self._rule.to_bytes(self._fast, token_id)
            self._bytes[token_id] = raw
        return raw

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those of `texts` that are special tokens."""
        ids = (self._fast.token_to_id(text) for text in texts)
        return self.special_ids.intersection(index for index in ids if index is not None)

    @property
    def strips_first_space(self) -> bool:
        """Whether decoding drops the one space that encoding put before the text."""
        return self._rule.strips_first_space

    @property
    def bytes_are_exact(self) -> bool:
        """Whether a decoded text is the concatenation of its tokens' bytes, which is true of all
        byte-level and SentencePiece vocabularies. Otherwise only `decode` tells."""
        return self._rule.exact

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters in the longest token: a text of n characters has at least n / longest_token
        tokens."""
        return max((len(piece) for piece in self._fast.get_vocab()), default=1)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(f"{name}_token")
        return None if text is None else self._fast.token_to_id(text)

    def _missing_bos(self) -> list[int]:
        """The begin-of-sequence id, when the config asks for it and tokenizer.json adds none."""
        if not self.config.get("add_bos_token") or self.bos_id is None:
            return []
        return [] if self.bos_id in self._fast.encode("").ids else [self.bos_id]


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts stay where both have `room`: the longer one loses first."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


class _DecodingRule:
    """How a vocabulary spells bytes, read off the tokenizer's decoder."""

    exact = True
    strips_first_space = False

    def to_bytes(self, fast: FastTokenizer, token_id: int) -> bytes:
        raise NotImplementedError


class _ByteLevel(_DecodingRule):
    """GPT-2's spelling: every byte is one printable character. A token with any other character
    (some added tokens) stands for itself."""

    def to_bytes(self, fast: FastTokenizer, token_id: int) -> bytes:
        piece = fast.id_to_token(token_id) or ""
        table = _byte_of_character()
        if all(character in table for character in piece):
            return bytes(table[character] for character in piece)
        return piece.encode()


class _SentencePiece(_DecodingRule):
    """SentencePiece's spelling: U+2581 is a space, `<0x0A>` is one byte."""

    def __init__(self, *, byte_fallback: bool, strips_first_space: bool) -> None:
        self._byte_fallback = byte_fallback
        self.strips_first_space = strips_first_space

    def to_bytes(self, fast: FastTokenizer, token_id: int) -> bytes:
        piece = fast.id_to_token(token_id) or ""
        if self._byte_fallback and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
            try:
                return bytes((int(piece[3:5], 16),))
            except ValueError:
                pass
        return piece.replace("\u2581", " ").encode()


class _Unknown(_DecodingRule):
    exact = False

    def to_bytes(self, fast: FastTokenizer, token_id: int) -> bytes:
        text: str = fast.decode([token_id], skip_special_tokens=False)
        return text.encode()


def _decoding_rule(fast: FastTokenizer) -> _DecodingRule:
    if fast.decoder is None:
        return _Unknown()
    state = json.loads(fast.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    by_type = {step["type"]: step for step in steps}
    if set(by_type) == {"ByteLevel"}:
        return _ByteLevel()
    if len(steps) > 1 and set(by_type) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replace, strip = by_type.get("Replace", {}), by_type.get("Strip")
        replaces_space = (
            replace.get("pattern") == {"String": "\u2581"} and replace.get("content") == " "
        )
        strips_space = strip is None or (strip["content"], strip["start"], strip["stop"]) == (
            " ",
            1,
            0,
        )
        if replaces_space and strips_space:
            return _SentencePiece(
                byte_fallback="ByteFallback" in by_type, strips_first_space=strip is not None
            )
    return _Unknown()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


def _add_missing_tokens(fast: FastTokenizer, added: Any) -> None:
    """Add what tokenizer_config.json lists and tokenizer.json lacks, under the ids it names."""
    if not isinstance(added, Mapping):
        return
    for key, entry in sorted(added.items(), key=lambda item: int(item[0])):
        known = fast.token_to_id(entry["content"])
        if known is None:
            fast.add_tokens(
                [
                    AddedToken(
                        entry["content"],
                        special=bool(entry.get("special")),
                        single_word=bool(entry.get("single_word")),
                        lstrip=bool(entry.get("lstrip")),
                        rstrip=bool(entry.get("rstrip")),
                        normalized=bool(entry.get("normalized")),
                    )
                ]
            )
            known = fast.token_to_id(entry["content"])
        if known != int(key):
            raise CheckpointError(
                f"tokenizer_config.json gives token {entry['content']!r} the id {key}, but "
                f"tokenizer.json gives it {known}; the two files are not of the same model."
            )


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with its `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
