"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece ("llama").

Owns the tables that stand in for a tokenizer.json. Needs the `tokenizers` library only.
Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from headrace.errors import CheckpointError

_PREFIX = "tokenizer.ggml."

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE_MARK = "\u2581"  # SentencePiece's visible space

# The patterns of the families' own tokenizer.json files, in Oniguruma's syntax.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = "|".join((_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _BLANKS))
_QWEN2_SPLIT = "|".join((_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _BLANKS))
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _BLANKS,
    )
)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class _PreTokenizer:
    """What `tokenizer.ggml.pre` stands for. `add_bos` is the default where the file is silent."""

    splits: Sequence[str] = ()
    individual_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer((_LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "smollm": _PreTokenizer(individual_digits=True),
    "gpt-2": _PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # Llama 3's tokenizer without a beginning-of-sequence token: what SmolLM3 has.
    "smaug-bpe": _PreTokenizer((_LLAMA3_SPLIT,), ignore_merges=True),
    "qwen2": _PreTokenizer((_QWEN2_SPLIT,), nfc=True),
    "deepseek-r1-qwen": _PreTokenizer((_QWEN2_SPLIT,), nfc=True),
    "tekken": _PreTokenizer((_TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
    # Files from before the key existed: the splits that llama.cpp falls back to.
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


@dataclass(frozen=True)
class GGUFTokenizerSettings:
    """What a tokenizer_config.json would say. Absent ids are None.

    stop_token_ids: the ids that end an answer (end of sequence, of turn, of message).
    chat_template: the template, or templates by name ("default", "tool_use", ...).
    """

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    stop_token_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None


def gguf_tokenizer_settings(metadata: Mapping[str, object]) -> GGUFTokenizerSettings:
    """Special ids, flags and templates of a GGUF file.

    Raises CheckpointError if an id lies outside the vocabulary.
    """
    size = len(_strings(metadata, "tokens"))

    def token_id(key: str) -> int | None:
        value = metadata.get(_PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < size:
            raise CheckpointError(
                f"GGUF metadata {_PREFIX + key} is {value!r}, outside the vocabulary of {size} "
                "tokens. The file is corrupt: download it again."
            )
        return value

    eos = token_id("eos_token_id")
    stops = (eos, token_id("eot_token_id"), token_id("eom_token_id"))
    add_bos = metadata.get(_PREFIX + "add_bos_token", _adds_bos_by_default(metadata))
    return GGUFTokenizerSettings(
        bos_token_id=token_id("bos_token_id"),
        eos_token_id=eos,
        unk_token_id=token_id("unknown_token_id"),
        pad_token_id=token_id("padding_token_id"),
        stop_token_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        add_bos=bool(add_bos),
        add_eos=bool(metadata.get(_PREFIX + "add_eos_token", False)),
        chat_template=_chat_template(metadata),
    )


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that `metadata` (of a GGUF header) describes.

    Token ids are those of the model. Control tokens become special tokens, which are matched in the
    text before anything else and left out by `decode(skip_special_tokens=True)`; user-defined ones
    are matched the same way but always decoded. `encode` adds the beginning and end of sequence
    where the file says so; `encode(add_special_tokens=False)` does not.
    Raises CheckpointError for an unknown kind of tokenizer or an inconsistent vocabulary.
    """
    model = metadata.get(_PREFIX + "model")
    builders: dict[object, Callable[[Mapping[str, object]], Tokenizer]] = {
        "gpt2": _byte_level_bpe,
        "llama": _sentencepiece_bpe,
    }
    if model not in builders:
        raise CheckpointError(
            f"GGUF metadata tokenizer.ggml.model is {model!r}; known: 'gpt2', 'llama'. "
            "Serve the model from its safetensors folder with a tokenizer.json instead."
        )
    tokenizer = builders[model](metadata)
    _add_tokens(tokenizer, metadata)
    _add_template(tokenizer, metadata)
    return tokenizer


def _byte_level_bpe(metadata: Mapping[str, object]) -> Tokenizer:
    pre = _pre_tokenizer(metadata)
    merges = [_split_merge(merge) for merge in _strings(metadata, "merges")]
    tokenizer = _bpe(_vocabulary(metadata), merges, ignore_merges=pre.ignore_merges)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.splits
    ]
    if pre.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.splits))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, object]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    settings = gguf_tokenizer_settings(metadata)
    unknown = None
    if settings.unk_token_id is not None:
        unknown = _strings(metadata, "tokens")[settings.unk_token_id]
    tokenizer = _bpe(
        vocabulary,
        _merges_from_scores(metadata, vocabulary),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=unknown,
    )
    # SentencePiece puts its dummy space before everything, also before a text that has one.
    dummy_space = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    marked = normalizers.Replace(" ", _SPACE_MARK)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE_MARK), marked]) if dummy_space else marked
    )
    steps = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(
    metadata: Mapping[str, object], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Merge rules that pick what SentencePiece picks: the pair whose joined piece scores best."""
    if _PREFIX + "merges" in metadata:
        return [_split_merge(merge) for merge in _strings(metadata, "merges")]
    scores = _array(metadata, "scores", len(vocabulary))
    types = _token_types(metadata, len(vocabulary))
    pieces = [piece for piece, index in vocabulary.items() if types[index] == _NORMAL]
    known = set(pieces)
    pieces.sort(key=lambda piece: -float(scores[vocabulary[piece]]))
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (pair for pair in splits if pair[0] in known and pair[1] in known),
            key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
        )
    return merges


def _bpe(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    unk_token: str | None = None,
) -> Tokenizer:
    try:
        return Tokenizer(
            BPE(
                vocabulary,
                merges,
                ignore_merges=ignore_merges,
                byte_fallback=byte_fallback,
                fuse_unk=fuse_unk,
                unk_token=unk_token,
            )
        )
    except Exception as error:  # the library raises plain Exception, for a merge of unknown tokens
        raise CheckpointError(
            f"GGUF metadata: vocabulary and merges do not fit together ({error}). "
            "The file is corrupt: download it again."
        ) from error


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> None:
    tokens = _strings(metadata, "tokens")
    types = _token_types(metadata, len(tokens))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
        ]
    )


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> None:
    settings = gguf_tokenizer_settings(metadata)
    tokens = _strings(metadata, "tokens")
    bos = settings.bos_token_id if settings.add_bos else None
    eos = settings.eos_token_id if settings.add_eos else None
    specials = [(tokens[token_id], token_id) for token_id in (bos, eos) if token_id is not None]
    if not specials:
        return
    first = [] if bos is None else ["<bos>"]
    last = [] if eos is None else ["<eos>"]
    named = {"<bos>": bos, "<eos>": eos}
    tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B:1", *(f"{name}:1" for name in last)],
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [tokens[token_id]]}
            for name, token_id in named.items()
            if token_id is not None
        ],
    )


def _pre_tokenizer(metadata: Mapping[str, object]) -> _PreTokenizer:
    name = metadata.get(_PREFIX + "pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"GGUF metadata tokenizer.ggml.pre is {name!r}; known: {', '.join(_PRE_TOKENIZERS)}. "
            "Serve the model from its safetensors folder with a tokenizer.json instead."
        )
    return _PRE_TOKENIZERS[str(name)]


def _adds_bos_by_default(metadata: Mapping[str, object]) -> bool:
    if metadata.get(_PREFIX + "model") == "llama":
        return True
    return _pre_tokenizer(metadata).add_bos


def _chat_template(metadata: Mapping[str, object]) -> str | dict[str, str] | None:
    prefix = "tokenizer.chat_template"
    template = metadata.get(prefix)
    named = {
        key.removeprefix(prefix + "."): value
        for key, value in metadata.items()
        if key.startswith(prefix + ".") and isinstance(value, str)
    }
    if isinstance(template, str):
        return {"default": template, **named} if named else template
    return named or None


def _vocabulary(metadata: Mapping[str, object]) -> dict[str, int]:
    tokens = _strings(metadata, "tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise CheckpointError(
            f"GGUF metadata tokenizer.ggml.tokens holds {twice!r} twice. "
            "The file is corrupt: download it again."
        )
    return vocabulary


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _token_types(metadata: Mapping[str, object], size: int) -> Sequence[object]:
    if _PREFIX + "token_type" not in metadata:
        return [_NORMAL] * size
    return _array(metadata, "token_type", size)


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    values = metadata.get(_PREFIX + key)
    # The reader's arrays have one type throughout, so the first element speaks for all.
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise CheckpointError(
            f"GGUF metadata {_PREFIX + key} is missing or not a list of strings. "
            "Use a file that includes its tokenizer."
        )
    return values


def _array(metadata: Mapping[str, object], key: str, size: int) -> list[float]:
    values = metadata.get(_PREFIX + key)
    if (
        not isinstance(values, list)
        or len(values) != size
        or not isinstance(values[0], int | float)
    ):
        raise CheckpointError(
            f"GGUF metadata {_PREFIX + key} is not a list of {size} numbers, one a token. "
            "The file is corrupt: download it again."
        )
    return values
