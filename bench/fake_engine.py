"""The real server in front of a scripted engine: answers, lengths and times are known beforehand.

    python -m bench.fake_engine --step-ms 20 --port 8000

The engine is a process of its own that speaks the real wire, so all but the model is as it is
served: HTTP, tokenizer, chat template, the socket between the processes, events, metrics. Its steps
take a given time; each gives every running request its next token.

An answer is the text of `--answer`, over and over until max_tokens (or to an end of sequence after
its first time with `--ends`). `--answer-of SEED=TEXT` is that of the requests with this seed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from headrace.config import EngineConfig, load_options
from headrace.engine import process
from headrace.engine.client import (
    EngineStats,
    FinishReason,
    ModelInfo,
    RequestOutput,
    RequestRecord,
    StepOutputs,
    TokenLogprobs,
)
from headrace.engine.process_client import ProcessEngineClient
from headrace.sampling_params import GenerateRequest

ANSWER = """\
A canal that leads water to a mill is called a headrace. It keeps its level along the slope while \
the river falls away beside it, so that at the end there is a drop to turn a wheel. Its builders \
(monks, in many a valley) measured with a water level and a staff: one foot in a thousand was \
enough. After the wheel, the tailrace carries the water back, at about 2.5 metres a second.

"""


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine does; its one argument, as JSON."""

    answers: dict[int, list[int]]
    """Token ids by seed; those of requests with another seed are under -1."""
    vocab_size: int
    eos_token_id: int
    step_seconds: float = 0.0
    """Length of a step. 0: as fast as they can be sent."""
    prefill_tokens: int = 0
    """Of one request's prompt in one step; 0: all of it."""
    ends: bool = False
    max_model_len: int = 8192
    max_num_seqs: int = 4096
    records: str = ""
    """A file to which the record of every request is written, a line of JSON each."""


class Running:
    """A request that the engine works on."""

    __slots__ = (
        "answer",
        "first",
        "handle",
        "length",
        "made",
        "request",
        "scheduled",
        "to_prefill",
    )

    def __init__(self, request: GenerateRequest, handle: int, script: Script) -> None:
        sampling, room = request.sampling, script.max_model_len - len(request.prompt_token_ids)
        self.request, self.handle = request, handle
        self.answer = script.answers.get(sampling.seed or 0, script.answers[-1])
        self.length = min(sampling.max_tokens or room, room)
        self.made = self.first = len(request.resume_token_ids)
        self.to_prefill = len(request.prompt_token_ids) + self.made
        self.scheduled = 0.0


class ScriptedEngine:
    """The part of engine.Engine that a process drives."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._running: dict[str, Running] = {}
        self._ended: list[RequestOutput] = []
        self._first_token_times: dict[str, float] = {}
        self._steps = 0
        self._step_tokens = 0
        self.info = ModelInfo(
            max_model_len=script.max_model_len,
            vocab_size=script.vocab_size,
            eos_token_ids=[script.eos_token_id],
            num_blocks=1 << 20,
            block_size=16,
            max_num_seqs=script.max_num_seqs,
            dtype="float32",
            device="none",
            weight_bytes=0,
            kv_cache_bytes=0,
            load_seconds=0.0,
            kernels={},
        )

    def add(self, request: GenerateRequest, handle: int) -> None:
        self._running[request.request_id] = Running(request, handle, self._script)

    def abort(self, request_id: str) -> None:
        row = self._running.get(request_id)
        if row is not None:
            self._end(row, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._ended)

    def idle(self) -> bool:
        return False

    def reset_prefix_cache(self) -> bool:
        return not self._running

    def step(self) -> StepOutputs:
        """Sleep for the length of a step, then give every request that was there its token."""
        began = time.monotonic()
        if self._script.step_seconds:
            time.sleep(self._script.step_seconds)
        outputs = StepOutputs([], [], self._ended)
        self._ended = []
        for row in list(self._running.values()):
            self._advance(row, outputs, began)
        outputs.details += self._ended  # of this step
        self._ended = []
        self._steps += 1
        self._step_tokens = len(outputs.handles) + len(outputs.details)
        outputs.stats = self.stats()
        return outputs

    def _advance(self, row: Running, outputs: StepOutputs, began: float) -> None:
        row.scheduled = row.scheduled or began
        if row.to_prefill > 0:
            row.to_prefill -= self._script.prefill_tokens or row.to_prefill
            if row.to_prefill > 0:
                return
        sampling, made = row.request.sampling, row.made
        token_id = row.answer[made % len(row.answer)]
        ends = self._script.ends and made >= len(row.answer) and not sampling.ignore_eos
        if ends and made >= sampling.min_tokens:
            self._end(row, FinishReason.STOP, self._script.eos_token_id)
        elif token_id in sampling.stop_token_ids and made >= sampling.min_tokens:
            self._end(row, FinishReason.STOP, token_id)
        elif made + 1 >= row.length:
            self._end(row, FinishReason.LENGTH, token_id)
        elif made == row.first or sampling.logprobs is not None:
            outputs.details.append(self._output(row, token_id))
        else:
            outputs.handles.append(row.handle)
            outputs.token_ids.append(token_id)
        row.made += 1

    def _end(self, row: Running, reason: FinishReason, token_id: int | None = None) -> None:
        del self._running[row.request.request_id]
        output = self._output(row, token_id)
        record = self._record(row, reason, row.made + (token_id is not None))
        stops = token_id if reason is FinishReason.STOP else None
        self._ended.append(
            replace(output, finish_reason=reason, stop_token_id=stops, record=record)
        )
        if self._script.records:
            with open(self._script.records, "ab") as records:
                records.write(msgspec.json.encode(record) + b"\n")

    def _output(self, row: Running, token_id: int | None) -> RequestOutput:
        request, first = row.request, row.made == row.first and token_id is not None
        now = time.monotonic() if first else 0.0
        if first:
            self._first_token_times[request.request_id] = now
        sampling, prompt = request.sampling, request.prompt_token_ids
        with_prompt = first and sampling.prompt_logprobs is not None
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[] if token_id is None else [token_id],
            logprobs=(
                None
                if sampling.logprobs is None or token_id is None
                else [self._logprobs(token_id, sampling.logprobs)]
            ),
            prompt_logprobs=(
                [None, *(self._logprobs(t, sampling.prompt_logprobs or 0) for t in prompt[1:])]
                if with_prompt
                else None
            ),
            cached_tokens=0 if first else None,
            scheduled_time=row.scheduled if first else 0.0,
            first_token_time=now,
        )

    def _logprobs(self, token_id: int, top: int) -> TokenLogprobs:
        """The token has log(1/2), and each of the others half of the one before it."""
        others = [token_id, *((token_id + i) % self._script.vocab_size for i in range(1, top))]
        values = [-0.6931471805599453 * (i + 1) for i in range(top)]
        return TokenLogprobs(-0.6931471805599453, others[:top], values)

    def _record(self, row: Running, reason: FinishReason, made: int) -> RequestRecord:
        request = row.request
        return RequestRecord(
            request_id=request.request_id,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=made,
            cached_tokens=0,
            preemptions=0,
            arrival_time=request.arrival_time,
            scheduled_time=row.scheduled,
            first_token_time=self._first_token_times.pop(request.request_id, 0.0),
            finished_time=time.monotonic(),
            tenant=request.tenant,
            max_tokens=request.sampling.max_tokens,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            kv_blocks_total=self.info.num_blocks,
            steps=self._steps,
            step_tokens=self._step_tokens,
            last_step_time=time.monotonic(),
        )


class ScriptedProcess(process.EngineProcess):
    def _load(self, config: EngineConfig) -> Any:
        return ScriptedEngine(msgspec.json.decode(sys.argv[1], type=Script))


# --- the server around it ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Texts, before a tokenizer made them ids."""

    default: str = ANSWER
    by_seed: tuple[tuple[int, str], ...] = ()


def script_for(model: str, answers: Answers, **more: Any) -> Script:
    """A script in the tokens of `model`, a reference as `headrace serve` takes it. `more`: fields
    of Script."""
    from headrace.loading.checkpoint import open_checkpoint
    from headrace.loading.resolver import resolve_model
    from headrace.text.processor import TextProcessor

    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer = TextProcessor.from_assets(checkpoint.tokenizer).tokenizer
    texts = {-1: answers.default, **dict(answers.by_seed)}
    return Script(
        answers={
            seed: tokenizer.encode(text, add_special_tokens=False) for seed, text in texts.items()
        },
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_id or 0,
        **more,
    )


@contextmanager
def scripted_engines(script: Script) -> Iterator[None]:
    """Engine processes that start while it lasts are scripted."""
    program = ProcessEngineClient.engine_program
    arguments = (str(Path(__file__).resolve()), msgspec.json.encode(script).decode())
    ProcessEngineClient.engine_program = arguments
    try:
        yield
    finally:
        ProcessEngineClient.engine_program = program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="", help="whose tokenizer and template to use (default: the default)")
    add("--answer", default=ANSWER)
    add("--answer-of", action="append", default=[], metavar="SEED=TEXT", help="repeatable")
    add("--ends", action="store_true", help="answers end, instead of starting over")
    add("--step-ms", type=float, default=0.0, help="(default: none, as fast as it can)")
    add("--prefill-tokens", type=int, default=0, help="of a prompt in a step (default: all)")
    add("--max-model-len", type=int, default=8192)
    add("--records", default="", metavar="FILE.jsonl", help="append every request's record")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of headrace serve")


def serve(args: argparse.Namespace, on_ready: Callable[[str], None]) -> int:
    """Serve until a signal; the exit status. `on_ready` gets the URL."""
    import uvloop

    from headrace import serve
    from headrace.observability.logging import configure_logging

    by_seed = (text.split("=", 1) for text in args.answer_of)
    script = script_for(
        args.model,
        Answers(default=args.answer, by_seed=tuple((int(seed), text) for seed, text in by_seed)),
        step_seconds=args.step_ms / 1000,
        prefill_tokens=args.prefill_tokens,
        ends=args.ends,
        max_model_len=args.max_model_len,
        records=args.records,
    )
    flags = dict(text.split("=", 1) for text in args.option)
    config, options, _ = load_options(args.model, {}, {"log_level": "error", "port": 0, **flags})
    configure_logging(options.log_level, options.log_format)
    with (
        scripted_engines(script),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(serve.run(config, options, on_ready=lambda service, url: on_ready(url)))


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        process.main(ScriptedProcess)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    sys.exit(serve(parser.parse_args(), lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
