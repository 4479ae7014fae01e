"""A scheduler with its cache but no model: tokens are a function of what came before them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from headrace.engine.batch import FinishedStep, ScheduledBatch, StepResult
from headrace.engine.block_pool import BlockPool
from headrace.engine.client import RequestOutput, StepOutputs
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.request import RunningRequests
from headrace.engine.scheduler import Scheduler
from headrace.sampling_params import GenerateRequest, SamplingParams

VOCAB_SIZE = 1000
EOS = 999


def next_token(tokens: Sequence[int]) -> int:
    """What the pretend model says after `tokens`: depends on all of them, never EOS."""
    return sum((index + 1) * token for index, token in enumerate(tokens)) % EOS


class PretendRunner:
    """Computes KV by remembering, per block slot, the token that was written there. It finds any
    block that was handed to two owners, read before it was written, or hashed wrongly."""

    def __init__(self, running: RunningRequests, num_blocks: int, block_size: int) -> None:
        self.running = running
        self.block_size = block_size
        self.slots = np.full((num_blocks, block_size), -1, np.int64)

    overlaps = False

    def launch(self, batch: ScheduledBatch) -> FinishedStep:
        running, size = self.running, self.block_size
        sampled = []
        for index, row in enumerate(batch.rows.tolist()):
            start, end = int(batch.starts[index]), int(batch.ends[index])
            assert end > start, "a row that computes nothing has no logits to sample from"
            blocks = running.block_table[row]
            for position in range(start, end):
                token = running.token_ids[row, position]
                self.slots[blocks[position // size], position % size] = token
            seen = [int(self.slots[blocks[p // size], p % size]) for p in range(end)]
            assert seen == running.token_ids[row, :end].tolist(), f"row {row} reads foreign KV"
            if batch.samples[index]:
                sampled.append(next_token(seen))
        return FinishedStep(StepResult(token_ids=np.array(sampled, np.int64)))


@dataclasses.dataclass
class Harness:
    """Scheduler, cache and pretend runner; `step` checks every invariant."""

    scheduler: Scheduler
    runner: PretendRunner
    running: RunningRequests
    kv_cache: KVCacheManager
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    ended: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)
    _ids: dict[int, str] = dataclasses.field(default_factory=dict)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        priority: int = 0,
        salt: str = "",
        **fields: object,
    ) -> None:
        handle = len(self._ids) + 1
        self._ids[handle] = request_id
        self.tokens[request_id] = []
        self.scheduler.add(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling=SamplingParams(**fields),  # type: ignore[arg-type]
                priority=priority,
                cache_salt=salt,
            ),
            handle,
        )

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id)
        if output is not None:
            self.ended[request_id] = output

    def step(self) -> tuple[ScheduledBatch, StepOutputs]:
        batch = self.scheduler.schedule()
        self.kv_cache.check_invariants()
        outputs = self.scheduler.update(batch, self.runner.launch(batch).result())
        for handle, token in zip(outputs.handles, outputs.token_ids, strict=True):
            self.tokens[self._ids[handle]].append(token)
        for detail in outputs.details:
            self.tokens[detail.request_id].extend(detail.token_ids)
            if detail.finish_reason is not None:
                self.ended[detail.request_id] = detail
        self.scheduler.check_invariants()
        return batch, outputs

    def run(self, limit: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still working after {limit} steps")


@pytest.fixture
def make_harness() -> Callable[..., Harness]:
    def make(
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_model_len: int = 64,
        budget: int = 16,
        prefix_caching: bool = True,
    ) -> Harness:
        running = RunningRequests(max_num_seqs, max_model_len, block_size, [EOS])
        kv_cache = KVCacheManager(
            BlockPool(num_blocks),
            running,
            block_size=block_size,
            key=b"test",
            kv_dtype="float32",
            enable_prefix_caching=prefix_caching,
        )
        scheduler = Scheduler(running, kv_cache, max_num_batched_tokens=budget, eos_token_ids=[EOS])
        runner = PretendRunner(running, num_blocks, block_size)
        return Harness(scheduler, runner, running, kv_cache)

    return make


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the pretend model generates after `prompt`, undisturbed."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture
def expected() -> Callable[[Sequence[int], int], list[int]]:
    return expected_tokens


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped-query attention, in the Hugging Face layout."""
    import torch
    from safetensors.torch import save_file

    vocab_size, hidden, layers, heads, kv_heads, head_dim, mlp = 160, 48, 2, 6, 2, 16, 96
    folder = tmp_path_factory.mktemp("tiny-llama")
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"model.embed_tokens.weight": weight(vocab_size, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        tensors |= {f"{prefix}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
