"""Simon Willison's `llm` command line, with the server in its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clients.conftest import Target

WHY = "the extra `clients` is not installed: make .venv/.clients"
pytest.importorskip("llm", reason=WHY)
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MODELS = """\
- model_id: local
  model_name: {model}
  api_base: {base}
  supports_tools: true
  supports_schema: true
- model_id: local-completions
  model_name: {model}
  api_base: {base}
  completion: true
"""

Llm = Callable[..., str]


@pytest.fixture
def home(target: Target, tmp_path: Path) -> Path:
    text = MODELS.format(model=target.model, base=target.v1)
    (tmp_path / "extra-openai-models.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def llm(home: Path) -> Llm:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "llm", *arguments],
            # Without plugins: the package of the default model is one, and wants llama.cpp.
            env={
                **os.environ,
                "LLM_LOAD_PLUGINS": "",
                "LLM_USER_PATH": str(home),
                "OPENAI_API_KEY": "any",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_streamed_and_whole(llm: Llm) -> None:
    question = ["What is the capital of France?", "-m", "local", "-o", "temperature", "0"]
    streamed = llm(*question)
    assert "Paris" in streamed
    assert llm(*question, "--no-stream") == streamed


def test_a_conversation_and_its_log(llm: Llm) -> None:
    llm("Say hello.", "-m", "local", "-s", "You are brief.", "-o", "max_tokens", "5")
    llm("And again.", "-c", "-o", "max_tokens", "5")
    first, second = json.loads(llm("logs", "--json", "-n", "0"))
    assert second["input_tokens"] > first["input_tokens"]  # it carried the first
    assert second["output_tokens"] == 5


def test_completions(llm: Llm) -> None:
    text = llm("The capital of France is", "-m", "local-completions", "-o", "max_tokens", "5")
    assert text.strip()


def test_models_are_listed(llm: Llm) -> None:
    assert "local" in llm("models")
