"""Tries a grammar out in a process of its own, before the engine has anything to do with it.

A grammar is a client's program for a compiler that cannot be interrupted: some take minutes, take
gigabytes, or overflow the stack. The process that does that here is ended, and its grammar refused.

Run as a script it is that process: it imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

CPU_SECONDS = 2
"""For one grammar, compiling and walking."""
WALL_SECONDS = 20.0
"""The same on a machine that has no time."""
MEMORY_BYTES = 1 << 30
"""Beyond what the process has before its first grammar."""
STACK_BYTES = 2 << 20
"""Far less than the thread has in which the engine compiles."""
WALK_TOKENS = 24
MASK_SECONDS = 0.25
"""For one token: a step waits for it."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
"""Of llguidance, here and in the engine: a step must not take long, even if it fails."""


class Verdict(NamedTuple):
    error: str
    """Why the grammar is refused; empty: it is not."""
    is_final: bool = True
    """Another trial says the same."""


class GrammarTrial:
    """The engine's end: one process, started when it is needed, for one caller at a time."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._setup = {"tokenizer": tokenizer_json, "vocab": vocab_size, "eos": eos_token_ids}
        self._process: subprocess.Popen[bytes] | None = None

    def verdict(self, grammar: str) -> Verdict:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            readable, _, _ = select.select([process.stdout], [], [], WALL_SECONDS)
            if line := process.stdout.readline() if readable else b"":
                return Verdict(json.loads(line))
        except BrokenPipeError:
            readable = [process.stdout]
        self.close()
        if readable:
            return Verdict("it takes too much time or memory to compile; simplify it.")
        return Verdict("the server has no time for it; try again later.", is_final=False)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self._setup).encode() + b"\n")
        return self._process


# --- the process ----------------------------------------------------------------------------------


def main() -> None:
    import resource

    from llguidance import LLTokenizer

    setup = json.loads(sys.stdin.buffer.readline())
    tokenizer = LLTokenizer(setup["tokenizer"], n_vocab=setup["vocab"], eos_token=setup["eos"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin.buffer:
        seconds = math.ceil(sum(os.times()[:2])) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        found: list[str] = []
        thread = threading.Thread(target=_try, args=(tokenizer, json.loads(line), found))
        thread.start()
        thread.join()
        sys.stdout.write(json.dumps(found[0]) + "\n")
        sys.stdout.flush()


def _try(tokenizer: Any, grammar: str, found: list[str]) -> None:
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    found.append(matcher.get_error() or _walk(matcher))


def _walk(matcher: Any) -> str:
    """Follow the grammar for some tokens; what went wrong."""
    choose = random.Random(0)
    for _ in range(WALK_TOKENS):
        begin = time.thread_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        seconds = time.thread_time() - begin
        if matcher.is_error():
            break
        if seconds > MASK_SECONDS:
            return f"to find the tokens that may follow takes {seconds:.1f} s; simplify it."
        matcher.consume_token(_some_bit(mask, choose))
        if matcher.is_stopped() or matcher.is_error():
            break
    error: str = matcher.get_error()
    return "nothing fits it." if error.startswith("NoExtension") else error


def _some_bit(mask: int, choose: random.Random) -> int:
    """The index of a bit that is set, at or after a random one."""
    start = choose.randrange(mask.bit_length())
    rest = mask >> start or mask
    return (rest & -rest).bit_length() - 1 + (start if rest is not mask else 0)


if __name__ == "__main__":
    main()
