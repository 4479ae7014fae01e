"""lm-evaluation-harness scores the server: its log-likelihoods are those of transformers in fp32.

The harness knows nothing of the model: it asks the server for its tokens, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.e2e.conftest import PATIENCE, _kept_whole

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

WHY = "the extra `clients` is not installed: make .venv/.clients"
pytest.importorskip("lm_eval", reason=WHY)
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = Path(__file__).parent / "tasks"
EXACT = ("--threads", "2", "--kv-cache-memory-bytes", "512MiB", "--dtype", "float32")

# Nats a token. Both compute in fp32, but add in different orders: tests/e2e/test_parity.py has
# differences below 1e-3 for single tokens, and a choice has at most five.
MARGIN = 1e-3


@pytest.fixture(scope="module")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _kept_whole(tmp_path_factory.mktemp("lm_eval"), EXACT)


@pytest.fixture(scope="module")
def evaluated(exact_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The harness's results, and its samples."""
    folder = tmp_path_factory.mktemp("lm_eval_out")
    tasks = folder / "tasks"
    shutil.copytree(TASKS, tasks)
    (model,) = httpx.get(f"{exact_server.url}/v1/models").json()["data"]
    arguments = {
        "model": model["id"],
        "base_url": f"{exact_server.url}/v1/completions",
        "num_concurrent": 4,
        "max_retries": 1,
    }
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={text}" for name, text in arguments.items())]
    command += ["--tasks", "common_knowledge", "--include_path", str(tasks)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    done = subprocess.run(
        command,
        cwd=tasks,  # the task names its data file relative to it
        env={**os.environ, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    lines = samples.read_text().splitlines()
    return json.loads(results.read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def expected(smollm2_path: Path, evaluated: Any) -> list[list[tuple[float, bool, int]]]:
    """Of each question and choice: log-likelihood, whether greedy, and the number of tokens, by
    transformers with its own tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    folder, name = smollm2_path.parent, smollm2_path.name
    model = loader.from_pretrained(folder, gguf_file=name, dtype="float32").eval()
    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(folder, gguf_file=name)

    def score(context: str, continuation: str) -> tuple[float, bool, int]:
        whole = tokenizer.encode(context + continuation)
        begin = len(tokenizer.encode(context))
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        rows = range(begin - 1, len(whole) - 1)
        chosen = [float(logprobs[row, whole[row + 1]]) for row in rows]
        greedy = all(int(logprobs[row].argmax()) == whole[row + 1] for row in rows)
        return sum(chosen), greedy, len(chosen)

    def arguments(sample: Any) -> list[tuple[str, str]]:
        return [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()]

    _, samples = evaluated
    return [[score(*pair) for pair in arguments(sample)] for sample in samples]


def test_log_likelihoods_are_those_of_transformers(evaluated: Any, expected: Any) -> None:
    _, samples = evaluated
    assert len(samples) == 20
    for sample, wanted in zip(samples, expected, strict=True):
        for (value, greedy), (theirs, is_greedy, tokens) in zip(
            sample["filtered_resps"], wanted, strict=True
        ):
            assert abs(float(value) - theirs) <= MARGIN * tokens
            assert (str(greedy) == "True") == is_greedy


def test_the_score_is_that_of_transformers(evaluated: Any, expected: Any) -> None:
    results, samples = evaluated
    right = [
        max(range(len(choices)), key=lambda index: choices[index][0]) == int(sample["target"])
        for sample, choices in zip(samples, expected, strict=True)
    ]
    score = results["results"]["common_knowledge"]["acc,none"]
    assert score == pytest.approx(sum(right) / len(right))
    assert 0 < score < 1


def test_the_harness_took_the_servers_tokenizer(exact_server: Server, evaluated: Any) -> None:
    info = httpx.get(f"{exact_server.url}/tokenizer_info", timeout=PATIENCE).json()
    assert info["eos_token"]
    assert exact_server.metrics()["headrace_requests_accepted_total"] >= 80
