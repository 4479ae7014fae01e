"""The engine stage's workloads on other engines: those that can be imported here."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.gpu_stages.checkpoints import random_checkpoint
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.record import Case, Result
from bench.gpu_stages.workloads import Workload, nano_vllm, uniform

Run = Callable[[Machine, Path, Workload], tuple[int, float]]
"""(output tokens, seconds)"""


def cases(machine: Machine) -> Iterator[Case]:
    model, workload = "Qwen3-0.6B", nano_vllm()
    if machine.dry_run:
        model, workload = "tiny", uniform(2, 8, 3, 300)
    for name, run in PEERS.items():
        case = f"{name} {model}: {workload.name}"
        yield Case(case, functools.partial(_measure, machine, name, run, model, workload))


def _measure(
    machine: Machine,
    name: str,
    run: Run,
    model: str,
    workload: Workload,
) -> Result:
    if importlib.util.find_spec(name) is None:
        return {"skipped": f"{name} is not installed"}
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    path = random_checkpoint(model, folder / "headrace-bench", machine.seed)
    tokens, seconds = run(machine, path, workload)
    return {"output tok/s": tokens / seconds, "seconds": seconds, "output tokens": tokens}


def _transformers(machine: Machine, path: Path, workload: Workload) -> tuple[int, float]:
    """Its continuous batching. It takes one length for all requests, so each is as long as the
    longest, and all of its tokens count: its batches stay full until the end."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(path, dtype=machine.dtype).to(machine.device)
    config = GenerationConfig(
        max_new_tokens=max(workload.output_lengths),
        do_sample=workload.temperature > 0,
        temperature=workload.temperature or None,
        eos_token_id=-1,
        pad_token_id=0,
    )
    generate = functools.partial(model.generate_batch, generation_config=config)
    if machine.dry_run:
        # It sizes its cache by the memory that is free, which on a CPU is everybody's.
        from transformers import ContinuousBatchingConfig

        generate.keywords["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=16)
    generate(inputs=workload.prompts[:2])
    start = time.perf_counter()
    generate(inputs=workload.prompts)
    tokens = len(workload.prompts) * max(workload.output_lengths)
    return tokens, time.perf_counter() - start


def _vllm(machine: Machine, path: Path, workload: Workload) -> tuple[int, float]:
    from vllm import LLM, SamplingParams

    model = LLM(str(path), load_format="dummy", max_model_len=4096, skip_tokenizer_init=True)
    sampling = [
        SamplingParams(
            temperature=workload.temperature, max_tokens=length, ignore_eos=True, detokenize=False
        )
        for length in workload.output_lengths
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    model.generate(prompts[:1], sampling[:1])
    start = time.perf_counter()
    model.generate(prompts, sampling)
    return workload.output_tokens, time.perf_counter() - start


def _sglang(machine: Machine, path: Path, workload: Workload) -> tuple[int, float]:
    import sglang

    engine = sglang.Engine(model_path=str(path), load_format="dummy", skip_tokenizer_init=True)
    sampling = [
        {"temperature": workload.temperature, "max_new_tokens": length, "ignore_eos": True}
        for length in workload.output_lengths
    ]
    engine.generate(input_ids=workload.prompts[:1], sampling_params=sampling[:1])
    start = time.perf_counter()
    engine.generate(input_ids=workload.prompts, sampling_params=sampling)
    return workload.output_tokens, time.perf_counter() - start


PEERS: dict[str, Run] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "sglang": _sglang,
}
