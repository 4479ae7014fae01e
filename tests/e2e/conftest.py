"""The real server as a process of its own, a small checkpoint, and ways to talk to both.

Nothing here looks inside the server: HTTP, signals, the exit status, standard error, processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import numpy as np
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from tests.conftest import API_PROCESSES
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE = 100.0
"""Seconds after which what should happen counts as not happening; no measure of speed."""
LIGHT = ("--threads", "2", "--kv-cache-memory-bytes", "512MiB", "--max-model-len", "2048")
TINY_LIGHT = ("--threads", "1", "--kv-cache-memory-bytes", "64MiB")


@dataclasses.dataclass
class Server:
    """A running `headrace serve`."""

    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
        )

    def connect(self) -> socket.socket:
        """A bare connection, for what a well-behaved client would not do."""
        return socket.create_connection(self.address, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels but for state, status and reason, which
        become part of the name: `headrace_kv_cache_blocks{used}`."""
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                kept = sample.labels.keys() & {"state", "status", "reason", "finished_reason"}
                label = "".join(sample.labels[name] for name in kept)
                name = f"{sample.name}{{{label}}}" if label else sample.name
                samples[name] = samples.get(name, 0.0) + sample.value
        return samples

    def finished(self, metrics: dict[str, float] | None = None) -> float:
        """Requests that ended, for whatever reason."""
        metrics = self.metrics() if metrics is None else metrics
        prefix = "headrace_requests_finished_total{"
        return sum(value for name, value in metrics.items() if name.startswith(prefix))

    def wait_idle(self) -> dict[str, float]:
        """The metrics, once no request runs, waits or is unaccounted for."""

        def idle() -> dict[str, float] | None:
            metrics = self.metrics()
            busy = metrics["headrace_requests_running"] + metrics["headrace_requests_waiting"]
            busy += metrics["headrace_requests_accepted_total"] - self.finished(metrics)
            return None if busy else metrics

        return self.wait_for(idle, "an idle server", lambda: self.get("/metrics").text)

    @property
    def engine_pid(self) -> int | None:
        """The engine process that lives now."""
        return next(iter(self.engine_pids), None)

    @property
    def engine_pids(self) -> list[int]:
        """The engine processes that live now: several where versions of a model change."""
        return self._children("headrace.engine.process")

    @property
    def api_pids(self) -> list[int]:
        """The API processes that live now, where there are several."""
        return self._children("headrace.api_processes.worker")

    def _children(self, module: str) -> list[int]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            # NoSuchProcess, or a zombie: it died since it was listed
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in child.cmdline():
                    found.append(int(child.pid))
        return found

    def kill_engine(self) -> None:
        """kill -9; returns when it is gone."""
        pid = self.wait_for(lambda: self.engine_pid, "an engine process")
        os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: not is_alive(pid), "the engine's death")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                return self.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        self.wait_for(ready, "/readyz", self.log.read_text)

    def wait_for(
        self,
        condition: Callable[[], T | None],
        what: str,
        detail: Callable[[], str] = lambda: "",
    ) -> T:
        """The first true value of `condition`, which is asked again and again."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.02)
        pytest.fail(f"waited {PATIENCE:.0f} s in vain for {what}. {detail()}")

    def stop(self) -> None:
        """SIGTERM must end it with status 0, and the engine with it."""
        engine_pid = self.engine_pid
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        assert engine_pid is not None and not is_alive(engine_pid)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class StartServer(Protocol):
    def __call__(self, *arguments: str | Path, wait: bool = True) -> Server: ...


class RunCommand(Protocol):
    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]: ...


def _command(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-P", "-m", "headrace.cli", *map(str, arguments)]


def _environment() -> dict[str, str]:
    """Ours without options that the person running the tests has set for their own servers."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HEADRACE_")}
    return {
        **kept,
        "HEADRACE_API_PROCESSES": os.environ.get(API_PROCESSES, "1"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")]),
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(log: Path, arguments: Sequence[str | Path]) -> Server:
    """A server that starts; whoever calls ends it."""
    port = free_port()
    # Not the data folder of the person running the tests.
    data = ["--data-dir", str(log.parent / "data")]
    command = _command(["serve", *data, *arguments, "--port", str(port)])
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=_environment(), stdout=output, stderr=output)
    return Server(process, ("127.0.0.1", port), log)


def _kept_whole(folder: Path, arguments: Sequence[str | Path]) -> Iterator[Server]:
    """A server that ends as it should: idle, on SIGTERM, with nothing leaked and a clean log."""
    server = launch(folder / "server.log", arguments)
    try:
        server.wait_ready()
        yield server
        metrics = server.wait_idle()
        server.stop()
    finally:
        server.process.kill()
    assert metrics["headrace_kv_cache_blocks{used}"] == 0
    log = server.log.read_text()
    assert "Traceback" not in log and " ERROR " not in log, log


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2-135M-Instruct. Tests leave it as they found it: running and idle."""
    yield from _kept_whole(tmp_path_factory.mktemp("server"), LIGHT)


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The small checkpoint, for many tokens. Tests leave it running and idle."""
    yield from _kept_whole(tmp_path_factory.mktemp("server"), [tiny_model, *TINY_LIGHT])


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that a test may ruin. `wait=False` returns before it is ready."""
    servers: list[Server] = []

    def start(*arguments: str | Path, wait: bool = True) -> Server:
        servers.append(launch(tmp_path / f"server-{len(servers)}.log", arguments))
        if wait:
            servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(PATIENCE)


@pytest.fixture
def run_command() -> RunCommand:
    """Runs `headrace ...` to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _command(arguments),
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


# --- a checkpoint that loads and steps within milliseconds --------------------------------------

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    save_file(_tiny_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|start|>", "<|pad|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": specials[-1]}))
    return folder


def _tiny_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    vocab, hidden, intermediate = 259, 64, 128

    def matrix(rows: int, columns: int) -> np.ndarray:
        drawn: np.ndarray = rng.standard_normal((rows, columns), np.float32)
        return drawn / np.float32(columns**0.5)

    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden) * 8,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(vocab, hidden) * 4,
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.self_attn.q_proj.weight": matrix(hidden, hidden) * 2,
            f"{prefix}.self_attn.k_proj.weight": matrix(32, hidden) * 2,
            f"{prefix}.self_attn.v_proj.weight": matrix(32, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, intermediate),
        }
    return weights
