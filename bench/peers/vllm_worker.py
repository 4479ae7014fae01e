"""vLLM, loaded once and asked many times. Run by the Python of an environment that has vLLM:
python -m bench.peers.vllm_worker, with this repository's root on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.peers import worker

WARM_TOKENS = 2
SPARE_TOKENS = 64  # requests that start first have as many more steps than the last one


def decode_rate(engine: Any, prompts: Sequence[list[int]], output_len: int) -> float:
    """Tokens per second while every request decodes, for about `output_len` tokens each."""
    _add(engine, prompts, max_tokens=output_len + SPARE_TOKENS)
    counts = [0] * len(prompts)
    while min(counts) <= WARM_TOKENS:
        _step(engine, counts)
    first, target = sum(counts), min(counts) + output_len
    begin = time.perf_counter()
    while min(counts) < target:
        _step(engine, counts)
    seconds = time.perf_counter() - begin
    tokens = sum(counts) - first
    engine.abort_request([str(index) for index in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()
    return tokens / seconds


def prefill_rate(engine: Any, prompts: Sequence[list[int]]) -> float:
    """Prompt tokens per second until each request has its first token."""
    _add(engine, prompts, max_tokens=1)
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return sum(map(len, prompts)) / (time.perf_counter() - begin)


def _add(engine: Any, prompts: Sequence[list[int]], max_tokens: int) -> None:
    from vllm import SamplingParams

    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)


def _step(engine: Any, counts: list[int]) -> None:
    """One step; counts[i] becomes the number of tokens that request i has."""
    for output in engine.step():
        # Some releases append a suffix of their own to the id.
        index = int(str(output.request_id).split("-")[0])
        counts[index] = len(output.outputs[0].token_ids)


def load() -> tuple[Mapping[str, Any], Callable[[Any], Mapping[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder as transformers saves it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine's steps are ours to time
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=False,
        seed=0,
    )
    engine = llm.llm_engine

    def answer(question: Any) -> Mapping[str, Any]:
        if question["output_len"]:
            return {"rate": decode_rate(engine, question["prompts"], question["output_len"])}
        prefill_rate(engine, question["warm"])
        return {"rate": prefill_rate(engine, question["prompts"])}

    return {"version": vllm.__version__}, answer


if __name__ == "__main__":
    worker.serve(load)
