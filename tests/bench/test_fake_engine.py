"""The scripted engine: what it answers, when, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench.fake_engine import Script, ScriptedEngine

from headrace.engine.client import FinishReason, RequestOutput, RequestRecord
from headrace.sampling_params import GenerateRequest, SamplingParams

ROOT = Path(__file__).parents[2]


def script(**fields: Any) -> Script:
    answers = {-1: [5, 6, 7], 42: [9, 10]}
    return Script(**{"answers": answers, "vocab_size": 100, "eos_token_id": 2, **fields})


def ask(engine: ScriptedEngine, prompt: int = 4, **sampling: Any) -> list[RequestOutput]:
    """Every step's output for one request, plain tokens included."""
    request = GenerateRequest(
        request_id="a", prompt_token_ids=[1] * prompt, sampling=SamplingParams(**sampling)
    )
    engine.add(request, 7)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        step = engine.step()
        plain = zip(step.handles, step.token_ids, strict=True)
        outputs += [RequestOutput(request_id=str(h), token_ids=[token]) for h, token in plain]
        outputs += step.details
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_an_answer_starts_over_or_ends() -> None:
    assert tokens(ask(ScriptedEngine(script()), max_tokens=5)) == [5, 6, 7, 5, 6]
    ended = ask(ScriptedEngine(script(ends=True)), max_tokens=5)
    assert (tokens(ended), ended[-1].finish_reason) == ([5, 6, 7, 2], FinishReason.STOP)
    going_on = ask(ScriptedEngine(script(ends=True)), max_tokens=5, ignore_eos=True)
    assert (tokens(going_on), going_on[-1].finish_reason) == ([5, 6, 7, 5, 6], FinishReason.LENGTH)


def test_a_seed_chooses_the_answer() -> None:
    assert tokens(ask(ScriptedEngine(script()), max_tokens=3, seed=42)) == [9, 10, 9]


def test_a_prompt_takes_as_many_steps_as_it_has_chunks(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    engine = ScriptedEngine(script(prefill_tokens=3, records=str(records)))
    outputs = ask(engine, prompt=7, max_tokens=2)
    assert engine.stats().steps == 4
    assert outputs[0].scheduled_time <= outputs[0].first_token_time
    record = msgspec.json.decode(records.read_bytes(), type=RequestRecord)
    assert record == outputs[-1].record
    assert (record.prompt_tokens, record.output_tokens) == (7, 2)
    assert record.first_token_time == outputs[0].first_token_time


def test_log_probabilities_are_those_asked_for() -> None:
    outputs = ask(ScriptedEngine(script()), max_tokens=2, logprobs=3, prompt_logprobs=0)
    assert [len(output.logprobs or ()) for output in outputs] == [1, 1]
    assert outputs[0].logprobs is not None and len(outputs[0].logprobs[0].top_token_ids) == 3
    assert len(outputs[0].prompt_logprobs or ()) == 4


def test_an_abort_leaves_a_record() -> None:
    engine = ScriptedEngine(script())
    engine.add(GenerateRequest(request_id="a", prompt_token_ids=[1], sampling=SamplingParams()), 7)
    engine.step()
    engine.abort("a")
    (output,) = engine.step().details
    assert output.finish_reason is FinishReason.ABORT
    assert output.record is not None and output.record.output_tokens == 1
    assert not engine.has_work


@pytest.mark.slow
def test_the_benchmark_of_the_api_process_runs(tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("server", "kernels", ""))
    arguments = ["--rounds", "1", "--only", "1 token, chat", "--save", str(tmp_path / "api.json")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.api", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = msgspec.json.decode((tmp_path / "api.json").read_bytes())["results"]
    assert [result["load"] for result in results] == ["1 token, chat stream", "1 token, chat"]
    assert all(result["rounds"][0]["tokens"] == 512 for result in results)
    assert all(result["us_per_request"]["median"] > 0 for result in results)
