"""Whatever is wrong with an option or a model file, `headrace serve` says so in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import RunCommand

pytestmark = pytest.mark.e2e

SLOW = pytest.mark.slow  # each case is a process: one of a kind is in the gate


def check_start_fails(
    run_command: RunCommand, *arguments: str | Path, words: tuple[str, ...]
) -> None:
    """Exit status 2 and, beside log lines, one line on standard error that says `words`."""
    if "--port" not in arguments:
        arguments = (*arguments, "--port", "0")
    result = run_command("serve", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    *log, line = result.stderr.splitlines()
    assert line.startswith("headrace"), result.stderr
    for word in words:
        assert word in line
    assert "Traceback" not in result.stderr
    assert not any(" ERROR " in other or " CRITICAL " in other for other in log), result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-model-length", "5"), ("--max-model-length", "did you mean '--max-model-len'")),
        pytest.param(("--dtype", "int3"), ("--dtype", "int3", "bfloat16"), marks=SLOW),
        pytest.param(("--port", "abc"), ("--port", "abc"), marks=SLOW),
        pytest.param(("--port", "99999"), ("99999", "65535"), marks=SLOW),
        (("--kv-cache-memory-bytes", "lots"), ("--kv-cache-memory-bytes", "'lots'", "2GiB")),
        pytest.param(("--config", "/nowhere.yaml"), ("/nowhere.yaml", "No such file"), marks=SLOW),
        (("/nowhere/model",), ("/nowhere/model", "no such file or folder")),
        pytest.param(("org/not-downloaded",), ("org/not-downloaded",), marks=SLOW),
    ],
)
def test_wrong_option_or_path(
    run_command: RunCommand, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    check_start_fails(run_command, *arguments, words=words)


def test_port_in_use(run_command: RunCommand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check_start_fails(run_command, "--port", port, words=(port, "in use", "--port"))


@SLOW
def test_unknown_key_in_the_configuration_file(run_command: RunCommand, tmp_path: Path) -> None:
    file = tmp_path / "headrace.yaml"
    file.write_text("max_num_seq: 3\n")
    words = ("max_num_seq", "did you mean 'max_num_seqs'")
    check_start_fails(run_command, "--config", file, words=words)


@pytest.mark.parametrize(
    "size", [pytest.param(3, marks=SLOW), pytest.param(100_000, marks=SLOW), 20_000_000]
)
def test_truncated_gguf(
    run_command: RunCommand, smollm2_path: Path, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "model.gguf"
    with smollm2_path.open("rb") as whole:
        file.write_bytes(whole.read(size))
    check_start_fails(run_command, file, words=(str(file),))


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def test_truncated_safetensors(run_command: RunCommand, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check_start_fails(run_command, broken, words=("model.safetensors", "truncated"))


@SLOW
def test_corrupt_safetensors_header(run_command: RunCommand, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    check_start_fails(run_command, broken, words=("model.safetensors",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ("MambaForCausalLM", "Llama")),
        pytest.param({"architectures": None}, ("config.json", "architectures"), marks=SLOW),
        pytest.param({"hidden_size": None}, ("config.json", "hidden_size"), marks=SLOW),
        pytest.param({"hidden_size": "many"}, ("config.json", "hidden_size"), marks=SLOW),
        pytest.param({"quantization_config": {"quant_method": "hqq"}}, ("hqq", "awq"), marks=SLOW),
    ],
)
def test_config_that_cannot_be_served(
    run_command: RunCommand, broken: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = json.loads((broken / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (broken / "config.json").write_text(json.dumps(config))
    check_start_fails(run_command, broken, words=words)


@SLOW
@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(run_command: RunCommand, broken: Path, missing: str) -> None:
    (broken / missing).unlink()
    word = "safetensors" if missing == "model.safetensors" else missing
    check_start_fails(run_command, broken, words=(word,))


@SLOW
def test_weights_of_another_shape(run_command: RunCommand, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"intermediate_size": 256}
    (broken / "config.json").write_text(json.dumps(config))
    check_start_fails(run_command, broken, words=("mlp", "128", "256"))


@SLOW
def test_config_that_is_not_json(run_command: RunCommand, broken: Path) -> None:
    (broken / "config.json").write_text("{")
    check_start_fails(run_command, broken, words=("config.json",))
