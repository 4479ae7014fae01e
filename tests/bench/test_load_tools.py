"""What load tools report is what the server saw: ours, and one that is not ours.

The engine is scripted with steps of 20 ms; the reference is its record of every request. A tool
sees a request earlier and a token later than the engine does, by a few milliseconds: prompts are
long enough for these to be less than 3%.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.loading.checkpoint import open_checkpoint
from headrace.loading.resolver import DEFAULT_MODEL, resolve_model
from headrace.text.processor import TextProcessor

ROOT = Path(__file__).parents[2]
REQUESTS, CONCURRENCY, INPUT, OUTPUT = 64, 8, 1024, 64
PREFILL = 32  # prompt tokens in a step: half a second and more to the first token
AIPERF = "aiperf==0.13.0"
TOLERANCE = 0.03

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Figures:
    """Milliseconds, and tokens per second."""

    ttft: float
    itl: float
    throughput: float


@dataclass(frozen=True)
class Server:
    url: str
    records: Path

    def figures(self) -> Figures:
        """Of the last REQUESTS: those before were to warm up."""
        lines = self.records.read_text().splitlines()
        records = sorted(map(json.loads, lines), key=lambda record: record["arrival_time"])
        records = records[-REQUESTS:]
        assert {record["output_tokens"] for record in records} == {OUTPUT}
        first, last = records[0], max(record["finished_time"] for record in records)
        return Figures(
            ttft=1000
            * statistics.median(r["first_token_time"] - r["arrival_time"] for r in records),
            itl=1000
            * statistics.mean(
                (r["finished_time"] - r["first_token_time"]) / (OUTPUT - 1) for r in records
            ),
            throughput=REQUESTS * OUTPUT / (last - first["arrival_time"]),
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    path = os.pathsep.join(str(ROOT / part) for part in ("server", "kernels", ""))
    records = tmp_path / "records.jsonl"
    options = ["--step-ms", "20", "--prefill-tokens", str(PREFILL), "--records", str(records)]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bench.fake_engine", *options),
            *("--option", f"data_dir={tmp_path / 'data'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server did not start"
        yield Server(url, records)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def agree(tool: Figures, server: Figures) -> None:
    for name, value in vars(server).items():
        assert getattr(tool, name) == pytest.approx(value, rel=TOLERANCE), name


def test_headrace_bench_serve(server: Server, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "headrace.cli", "bench", "serve", "--base-url", server.url),
            *("--num-prompts", str(REQUESTS), "--num-warmups", "1", "--ignore-eos"),
            *("--max-concurrency", str(CONCURRENCY)),
            *("--input-len", str(INPUT), "--output-len", str(OUTPUT)),
            *("--save-result", str(result)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        check=True,
    )
    found = json.loads(result.read_text())
    tool = Figures(found["median_ttft_ms"], found["mean_itl_ms"], found["output_throughput"])
    agree(tool, server.figures())


@pytest.fixture(scope="session")
def aiperf(pytestconfig: pytest.Config) -> Path:
    """In an environment of its own, which stays in pytest's cache: it pins what we use, too."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(AIPERF.replace("==", "-"))
    program = folder / "bin" / "aiperf"
    if not program.exists():
        python = folder / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", AIPERF]
        for command in ([sys.executable, "-m", "venv", folder], pip):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                pytest.skip(f"{AIPERF} cannot be installed: {' '.join(last)}")
    return program


def test_aiperf(server: Server, aiperf: Path, tmp_path: Path) -> None:
    tokenizer = TextProcessor.from_assets(open_checkpoint(resolve_model("")).tokenizer).tokenizer
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))
    }
    log = tmp_path / "aiperf.log"
    with log.open("w") as output:
        done = subprocess.run(
            [
                *(aiperf, "profile", "--url", server.url, "--model", DEFAULT_MODEL),
                *("--endpoint-type", "chat", "--streaming", "--tokenizer", folder),
                *("--concurrency", str(CONCURRENCY), "--request-count", str(REQUESTS)),
                *("--warmup-request-count", str(CONCURRENCY)),
                *("--isl", str(INPUT), "--osl", str(OUTPUT)),
                *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
                # What it does beside the load would take the cores from the load.
                *("--no-server-metrics", "--no-gpu-telemetry", "--workers-max", "1"),
                *("--ui", "none", "--artifact-dir", tmp_path / "artifacts"),
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    found = json.loads((tmp_path / "artifacts" / "profile_export_aiperf.json").read_text())
    tool = Figures(
        found["time_to_first_token"]["p50"],
        found["inter_token_latency"]["avg"],
        found["output_token_throughput"]["avg"],
    )
    agree(tool, server.figures())
