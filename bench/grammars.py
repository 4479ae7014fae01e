"""What structured output costs: grammars in llguidance and xgrammar, and steps of the engine.

    python bench/grammars.py libraries     # on the default model's vocabulary
    python bench/grammars.py steps         # 16 requests of the default model

Prints JSON. xgrammar is measured if it is installed. The kinds of step are taken in turns, for
machines that others use, too; CPU time is the steadier figure there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from headrace.config import CacheOptions, EngineConfig, ModelOptions
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.loading.checkpoint import open_checkpoint
from headrace.loading.resolver import resolve_model
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace.text.processor import TextProcessor

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "likes": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "likes", "address"],
    "additionalProperties": False,
}
LINKED = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
PATTERNS = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "at": {"type": "string", "format": "date-time"},
        "note": {"type": "string", "maxLength": 200},
    },
    "required": ["id", "at", "note"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": "string"} for i in range(200)},
    "required": [f"field_{i}" for i in range(200)],
    "additionalProperties": False,
}
TEXTS: dict[str, tuple[Any, Any]] = {
    "person": (
        PERSON,
        {
            "name": "Ada Lovelace",
            "age": 36,
            "likes": ["red", "blue"],
            "address": {"street": "12 St James's Square", "zip": "SW1"},
        },
    ),
    "linked": (LINKED, {"value": 1.5, "next": {"value": -2, "next": {"value": 3, "next": None}}}),
    "patterns": (
        PATTERNS,
        {"id": "ABC-1234", "at": "2026-11-23T20:00:00Z", "note": "A word, and another one."},
    ),
    "wide": (WIDE, {f"field_{i}": f"value {i}" for i in range(200)}),
    "any": ({"type": "object"}, {"a": [1, 2.5, {"b": None}], "c": "text", "d": {"e": [True]}}),
}


# --- libraries ------------------------------------------------------------------------------------


def libraries(text: TextProcessor, vocab_size: int) -> dict[str, Any]:
    tokenizer = text.tokenizer
    makers = {"llguidance": _llguidance(tokenizer, vocab_size)}
    with contextlib.suppress(ImportError):
        makers["xgrammar"] = _xgrammar(tokenizer, vocab_size)
    found: dict[str, Any] = {}
    for name, (schema, value) in TEXTS.items():
        ids = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        found[name] = {"tokens": len(ids)}
        for library, make in makers.items():
            found[name][library] = _walk(make, schema, ids)
    return found


def _walk(make: Callable[[Any], Any], schema: Any, ids: list[int]) -> dict[str, float]:
    begin = time.perf_counter()
    fill, accept = make(schema)
    compiled = time.perf_counter() - begin
    masks, accepts = [], []
    for token_id in ids:
        begin = time.perf_counter()
        fill()
        between = time.perf_counter()
        assert accept(token_id), f"token {token_id} is not allowed"
        masks.append(between - begin)
        accepts.append(time.perf_counter() - between)
    return {
        "compile_ms": round(compiled * 1e3, 2),
        "mask_us_mean": round(statistics.mean(masks) * 1e6, 1),
        "mask_us_worst": round(max(masks) * 1e6, 1),
        "accept_us_mean": round(statistics.mean(accepts) * 1e6, 1),
    }


def _llguidance(tokenizer: Any, vocab_size: int) -> Callable[[Any], Any]:
    from llguidance import LLMatcher, LLTokenizer

    begin = time.perf_counter()
    spelled = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=[tokenizer.eos_id])
    print(f"# llguidance: tokenizer in {time.perf_counter() - begin:.2f} s")
    mask = np.zeros(-(-vocab_size // 32), np.int32)

    def make(schema: Any) -> Any:
        matcher = LLMatcher(spelled, f"start: %json {json.dumps(schema)}", log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return lambda: matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes), (
            matcher.consume_token
        )

    return make


def _xgrammar(tokenizer: Any, vocab_size: int) -> Callable[[Any], Any]:
    import xgrammar

    begin = time.perf_counter()
    vocabulary = [tokenizer.token_piece(index) for index in range(vocab_size)]
    info = xgrammar.TokenizerInfo(
        vocabulary,
        xgrammar.VocabType.BYTE_LEVEL,
        vocab_size=vocab_size,
        stop_token_ids=[tokenizer.eos_id],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
    print(f"# xgrammar: tokenizer in {time.perf_counter() - begin:.2f} s")
    mask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def make(schema: Any) -> Any:
        compiled = compiler.compile_json_schema(json.dumps(schema))
        matcher = xgrammar.GrammarMatcher(compiled)
        return lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token

    return make


# --- steps ----------------------------------------------------------------------------------------

ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 999}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 999}
GRAMMARS = {
    "strings": f"start: %json {json.dumps({**STRINGS, 'x-guidance': ON_ONE_LINE})}",
    "people": f"start: %json {json.dumps({**PEOPLE, 'x-guidance': ON_ONE_LINE})}",
    "regex": r"start: /[a-zA-Z ,.]{600}/",
}
"""None ends within the tokens that are asked for."""


def steps(engine: Engine, text: TextProcessor, *, requests: int, rounds: int) -> dict[str, Any]:
    """A decode step, with a grammar in each row and without any: wall time, and CPU time of the
    process, in milliseconds. A token of a row that jumps counts as one of all that it got."""
    engine.use_tokenizer(text.tokenizer.to_json())
    prompt = text.tokenizer.encode("Once upon a time, there was a list of", add_special_tokens=True)
    kinds = {"none": "", **GRAMMARS}
    for grammar in kinds.values():
        list(_run(engine, prompt, grammar, requests, 8))  # compiled, recorded
    found: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, grammar in kinds.items():
            found[kind] += _run(engine, prompt, grammar, requests, 48)
    result = {}
    for kind, steps in found.items():
        wall, cpu, tokens = (np.array(column) for column in zip(*steps, strict=True))
        result[kind] = {
            "wall_ms": round(float(np.median(wall)) * 1e3, 2),
            "cpu_ms": round(float(np.median(cpu)) * 1e3, 2),
            "tokens_a_step": round(float(tokens.mean()), 2),
            "cpu_us_a_token": round(float(cpu.sum() / tokens.sum()) * 1e6, 1),
        }
    return result


def _run(
    engine: Engine, prompt: list[int], grammar: str, requests: int, max_tokens: int
) -> Iterator[tuple[float, float, int]]:
    """(seconds, CPU seconds, tokens) of each step but those that begin or end the requests."""
    for index in range(requests):
        sampling = SamplingParams(seed=index, max_tokens=max_tokens, ignore_eos=not grammar)
        engine.add(
            GenerateRequest(
                request_id=f"r{index}",
                prompt_token_ids=prompt,
                sampling=sampling,
                grammar=grammar,
            ),
            index + 1,
        )
    while engine.has_work:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        outputs = engine.step()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
        full = len(outputs.handles) + len(outputs.details) == requests
        if full and all(detail.cached_tokens is None for detail in outputs.details):
            more = sum(len(detail.token_ids) for detail in outputs.details)
            yield seconds, cpu, len(outputs.handles) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["libraries", "steps"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path = resolve_model("")
    text = TextProcessor.from_assets(open_checkpoint(path).tokenizer)
    if options.what == "libraries":
        result = libraries(text, text.tokenizer.vocab_size)
    else:
        config = EngineConfig(
            model=str(path),
            model_options=ModelOptions(max_model_len=512),
            cache=CacheOptions(kv_cache_memory_bytes=1 << 28),
        )
        engine = build_engine(config)
        result = steps(engine, text, requests=options.requests, rounds=options.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
