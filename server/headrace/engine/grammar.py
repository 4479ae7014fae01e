"""What a grammar allows next in one request's output, and how grammars become that.

llguidance (https://github.com/guidance-ai/llguidance) parses: docs/decisions/0008. It is imported
when the first grammar comes: an engine without one does without.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.engine.grammar_trial import LIMITS, GrammarTrial
from headrace.sampling_params import GenerateRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

COMPILE_THREADS = 2
COMPILE_STACK_BYTES = 32 << 20
"""Much more than a trial has."""
MAX_MESSAGE = 1000
"""Characters of what llguidance says of a grammar that reach a client."""


class GrammarError(Exception):
    """A grammar that cannot be used; the message is for the client."""


class _TransientError(GrammarError):
    """Another time it may work."""


class Constraint:
    """One request's place in its grammar. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.error = ""
        """Why nothing more can be said: the request ends with it."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """Go on behind tokens that were sampled or delivered before."""
        if not self.error and not self.matcher.consume_tokens(list(token_ids)):
            self.note_error()

    def force(self, limit: int, *, at_least: int = 1) -> list[int]:
        """Go on behind the tokens, `limit` at most, that must come next; returns them. If they are
        fewer than `at_least`, nothing is done."""
        if self.error or limit <= 0:
            return []
        forced = self.matcher.compute_ff_tokens()[:limit]
        if len(forced) < at_least:
            return []
        self.accept(forced)
        return [] if self.error else forced

    def note_error(self) -> None:
        """Take over the matcher's error, if it has one."""
        if not self.error and self.matcher.is_error():
            self.error = _message(self.matcher.get_error())

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token can follow."""
        return bool(self.matcher.is_stopped())


class Compiled(NamedTuple):
    """A request whose grammar is through."""

    source: GenerateRequest
    handle: int
    constraint: Constraint | None
    error: str
    """Why there is no constraint."""


@dataclass(slots=True)
class _Job:
    source: GenerateRequest
    handle: int
    matcher: Future[LLMatcher]
    started: float


class GrammarCompiler:
    """Compiles grammars in threads of its own; the newest `cache_size` of them are kept.

    All methods are for the engine's thread.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Collection[int],
        *,
        time_limit: float = 30.0,
        cache_size: int = 128,
    ) -> None:
        """`vocab_size`: logits of a row. `time_limit`: seconds that a request waits at most."""
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._time_limit = time_limit
        self._cache_size = cache_size
        self._tokenizer_json = ""
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._own = threading.local()  # each thread has a trial process
        self._threads: ThreadPoolExecutor | None = None
        self._cache: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()
        self._jobs: dict[str, _Job] = {}

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """How tokens are spelled: the content of a tokenizer.json. The first one stays."""
        self._tokenizer_json = self._tokenizer_json or tokenizer_json

    def __len__(self) -> int:
        """Requests that wait for their grammars."""
        return len(self._jobs)

    def start(self, source: GenerateRequest, handle: int) -> None:
        key = _key(source.grammar)
        matcher = self._cache.get(key)
        if matcher is None:
            matcher = self._cache[key] = self._submit(source.grammar)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        self._jobs[source.request_id] = _Job(source, handle, matcher, time.monotonic())

    def cancel(self, request_id: str) -> GenerateRequest | None:
        """Forget a request that waits here. None if none of that id does."""
        job = self._jobs.pop(request_id, None)
        return None if job is None else job.source

    def wait(self, seconds: float) -> None:
        """Until a grammar is through, or so long."""
        wait([job.matcher for job in self._jobs.values()], seconds, "FIRST_COMPLETED")

    def take(self) -> list[Compiled]:
        """The requests that need not wait any longer, in the order of their arrival."""
        if not self._jobs:
            return []
        late = time.monotonic() - self._time_limit
        through = [job for job in self._jobs.values() if job.matcher.done() or job.started < late]
        for job in through:
            del self._jobs[job.source.request_id]
        return [self._result(job) for job in through]

    def _result(self, job: _Job) -> Compiled:
        constraint, error = None, ""
        try:
            if not job.matcher.done():
                raise GrammarError(
                    f"The grammar is not compiled after {self._time_limit:g} s; simplify it."
                )
            constraint = Constraint(job.matcher.result().deep_copy(), self._vocab_size)
            constraint.accept(job.source.resume_token_ids)
            error = constraint.error
        except GrammarError as refused:
            error = str(refused)
            if isinstance(refused, _TransientError):
                self._cache.pop(_key(job.source.grammar), None)
        except Exception as bug:  # it may be the grammar's: others must not die of it
            logger.exception("A grammar could not be compiled")
            error = f"it could not be compiled: {type(bug).__name__}"
        return Compiled(job.source, job.handle, None if error else constraint, error)

    def _submit(self, grammar: str) -> Future[LLMatcher]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(COMPILE_THREADS, "grammar")
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            return self._threads.submit(self._compile, grammar)
        finally:
            threading.stack_size(before)

    # --- in the threads ---------------------------------------------------------------------

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._spelling()
        if (trial := getattr(self._own, "trial", None)) is None:
            trial = GrammarTrial(self._tokenizer_json, self._vocab_size, self._eos_token_ids)
            self._own.trial = trial
        verdict = trial.verdict(grammar)
        if verdict.error:
            error = _TransientError if not verdict.is_final else GrammarError
            raise error(_message(verdict.error))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise GrammarError(_message(matcher.get_error()))
        return matcher

    def _spelling(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._tokenizer_lock:
            if self._tokenizer is None:
                if not self._tokenizer_json:
                    raise GrammarError("the engine was not told how tokens are spelled.")
                try:
                    self._tokenizer = LLTokenizer(
                        self._tokenizer_json,
                        n_vocab=self._vocab_size,
                        eos_token=self._eos_token_ids,
                    )
                except ValueError as error:
                    raise GrammarError(
                        f"Structured output does not work with this model's tokenizer: {error}"
                    ) from error
            return self._tokenizer


def _key(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode()).digest()


def _message(text: str) -> str:
    """llguidance's, without the state that it adds, and without lines that clients cannot read."""
    lines = [line for line in text.partition("\n<")[0].splitlines() if len(line) <= 200]
    message = "\n".join(lines).strip() or text[:200]
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
