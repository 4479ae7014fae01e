"""An engine without a model: tokens are a function of what came before them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from headrace.engine.batch import ScheduledBatch, StepResult
from headrace.engine.block_pool import BlockPool
from headrace.engine.client import ModelInfo, RequestOutput, StepOutputs, TokenLogprobs
from headrace.engine.engine import Engine
from headrace.engine.kv_cache import KVCacheManager
from headrace.engine.request import UNKNOWN_TOKEN, RunningRequests
from headrace.engine.sampler import NO_TOKEN, SamplingBatch
from headrace.engine.sampling_batch import sampling_columns
from headrace.engine.scheduler import Scheduler
from headrace.sampling_params import GenerateRequest, SamplingParams, ThinkingBudget

VOCAB_SIZE = 1000
EOS = 999
BROKEN = 998
"""`logit_bias={BROKEN: k}` breaks the logits of output token k, `{EOS: k}` makes it EOS."""


def next_token(tokens: Sequence[int]) -> int:
    """What the pretend model says after `tokens`: depends on all of them, never EOS."""
    return sum((index + 1) * token for index, token in enumerate(tokens)) % EOS


@dataclasses.dataclass
class PretendStep:
    value: StepResult
    on_result: Callable[[], None]

    def result(self) -> StepResult:
        self.on_result()
        return self.value


class PretendRunner:
    """Computes KV by remembering, per block slot, the token that was written there. It finds any
    block that was handed to two owners, read before it was written, or hashed wrongly.

    With `overlaps` results are made when a step is launched and read later, as a device's stream
    would: what an input UNKNOWN_TOKEN stands for is known here only.
    """

    def __init__(
        self, running: RunningRequests, num_blocks: int, block_size: int, *, overlaps: bool
    ) -> None:
        self.running = running
        self.block_size = block_size
        self.overlaps = overlaps
        self.slots = np.full((num_blocks, block_size), -1, np.int64)
        self.last_token = np.full(running.capacity, NO_TOKEN, np.int64)
        self.batches: list[ScheduledBatch] = []
        self.num_read = 0
        self.on_launch: Callable[[], None] = lambda: None

    def launch(self, batch: ScheduledBatch) -> PretendStep:
        assert len(self.batches) - self.num_read <= self.overlaps, "too many steps in flight"
        self.on_launch()
        running, size = self.running, self.block_size
        assert batch.num_tokens == batch.num_scheduled.sum() > 0
        assert (batch.generations == running.generations[batch.rows]).all()
        histories = []
        for index, row in enumerate(batch.rows.tolist()):
            start, end = int(batch.starts[index]), int(batch.ends[index])
            assert end > start, "a row that computes nothing has no logits to sample from"
            blocks = running.block_table[row]
            tokens = self._inputs(index, batch)
            for position in range(start, end):
                self.slots[blocks[position // size], position % size] = tokens[position]
            seen = [int(self.slots[blocks[p // size], p % size]) for p in range(end)]
            assert seen == tokens, f"row {row} reads foreign KV"
            histories.append(seen)
        value = self._sample(batch, histories)
        self.batches.append(batch)
        return PretendStep(value, self._read_in_order(len(self.batches)))

    def _inputs(self, index: int, batch: ScheduledBatch) -> list[int]:
        """The row's tokens up to the end of its chunk, with the one that is in flight."""
        row, start, end = int(batch.rows[index]), int(batch.starts[index]), int(batch.ends[index])
        tokens: list[int] = self.running.token_ids[row, :end].tolist()
        in_flight = False
        if len(self.batches) > self.num_read:
            before = self.batches[-1]
            mine = (before.rows == row) & (before.generations == batch.generations[index])
            in_flight = bool((mine & before.samples).any())
        unknown = [position for position in range(end) if tokens[position] == UNKNOWN_TOKEN]
        assert unknown == [start] * in_flight, f"row {row}: unknown is not what is in flight"
        if in_flight:
            tokens[start] = max(int(self.last_token[row]), 0)
        return tokens

    def _sample(self, batch: ScheduledBatch, histories: list[list[int]]) -> StepResult:
        rows, positions = batch.rows[batch.samples], batch.ends[batch.samples]
        columns = sampling_columns(self.running, rows, positions)
        sampled: list[int] = []
        logprobs, prompt_logprobs = {}, {}
        for index, row in enumerate(batch.rows.tolist()):
            history, start = histories[index], int(batch.starts[index])
            num_prompt_tokens = int(self.running.num_prompt_tokens[row])
            if row in self.running.with_prompt_logprobs:
                end = min(int(batch.ends[index]) + 1, num_prompt_tokens)
                targets = self.running.token_ids[row, start + 1 : end].tolist()
                prompt_logprobs[row] = [TokenLogprobs(-token, [], []) for token in targets]
            if not batch.samples[index]:
                continue
            token = choose(history, num_prompt_tokens, columns, len(sampled))
            if columns.num_logprobs[len(sampled)] >= 0 and token != NO_TOKEN:
                logprobs[row] = TokenLogprobs(-float(token), [], [])
            sampled.append(token)
            self.last_token[row] = token
        return StepResult(np.array(sampled, np.int64), logprobs, prompt_logprobs)

    def _read_in_order(self, number: int) -> Callable[[], None]:
        def read() -> None:
            self.num_read += 1
            assert self.num_read == number, "results are read once each, in order"

        return read


def choose(history: list[int], num_prompt_tokens: int, columns: SamplingBatch, index: int) -> int:
    """The pretend sampler, which heeds penalties, bias and bans."""
    token = next_token(history)
    assert columns.position[index] == len(history)
    if index in columns.penalized:
        prompt_ids, output_ids = columns.penalized[index]
        assert [*prompt_ids, *output_ids] == history, "a penalty needs every token"
        assert len(prompt_ids) == num_prompt_tokens
        token = (token + 7 * len(output_ids)) % EOS
    ids, values = columns.logit_bias.get(index, ((), ()))
    for biased, at in zip(ids, values, strict=True):
        if len(history) == num_prompt_tokens + at:
            token = {BROKEN: NO_TOKEN, EOS: EOS}[int(biased)]
    if index in columns.allowed and token not in columns.allowed[index]:
        token = int(columns.allowed[index][0])
    allowed = np.ones(VOCAB_SIZE, np.uint8)
    if (mask := columns.masks.get(index)) is not None:
        allowed = np.unpackbits(mask.view(np.uint8), count=VOCAB_SIZE, bitorder="little")
        if not allowed.any():
            return NO_TOKEN
        assert index not in columns.banned, "end tokens are taken out of the mask"
    wraps = EOS if mask is None else VOCAB_SIZE
    while token != NO_TOKEN and (token in columns.banned.get(index, ()) or not allowed[token]):
        token = (token + 1) % wraps
    return token


@dataclasses.dataclass
class Harness:
    """An engine over the pretend runner; `step` checks every invariant."""

    engine: Engine
    scheduler: Scheduler
    runner: PretendRunner
    running: RunningRequests
    kv_cache: KVCacheManager
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    logprobs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    ended: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)
    _ids: dict[int, str] = dataclasses.field(default_factory=dict)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        priority: int = 0,
        salt: str = "",
        deadline: float | None = None,
        resume: Sequence[int] = (),
        banned: Sequence[list[int]] = (),
        thinking: ThinkingBudget | None = None,
        grammar: str = "",
        broken_at: int | None = None,
        eos_at: int | None = None,
        **fields: object,
    ) -> None:
        """`broken_at` and `eos_at` number output tokens from 0; `fields` are SamplingParams'."""
        bias = {BROKEN: broken_at, EOS: eos_at}
        fields["logit_bias"] = {token: at for token, at in bias.items() if at is not None}
        handle = len(self._ids) + 1
        self._ids[handle] = request_id
        self.tokens.setdefault(request_id, [])
        self.engine.add(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling=SamplingParams(**fields),  # type: ignore[arg-type]
                priority=priority,
                cache_salt=salt,
                deadline=deadline,
                resume_token_ids=list(resume),
                banned_sequences=list(banned),
                thinking=thinking,
                grammar=grammar,
            ),
            handle,
        )

    def inherit(self, other: Harness) -> None:
        """Go on with what the requests of `other` got."""
        self.tokens, self.ended = other.tokens, other.ended
        self.logprobs, self.prompt_logprobs = other.logprobs, other.prompt_logprobs

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id)
        if output is not None:
            self.ended[request_id] = output

    def step(self) -> tuple[ScheduledBatch | None, StepOutputs]:
        """(what was launched, what was found)"""
        num_launched = len(self.runner.batches)
        outputs = self.engine.step()
        launched = self.runner.batches[num_launched:]
        for handle, token in zip(outputs.handles, outputs.token_ids, strict=True):
            request_id = self._ids[handle]
            assert request_id not in self.ended, "a token after the end"
            self.tokens[request_id].append(token)
        for detail in outputs.details:
            self._note(detail)
        self.engine.check_invariants()
        return (launched[0] if launched else None), outputs

    def _note(self, detail: RequestOutput) -> None:
        request_id = detail.request_id
        assert request_id not in self.ended, "an output after the end"
        self.tokens[request_id].extend(detail.token_ids)
        if detail.logprobs is not None:
            self.logprobs.setdefault(request_id, []).extend(p.logprob for p in detail.logprobs)
        if detail.prompt_logprobs is not None:
            assert request_id not in self.prompt_logprobs, "prompt log-probabilities come once"
            self.prompt_logprobs[request_id] = [
                entry and entry.logprob for entry in detail.prompt_logprobs
            ]
        if detail.finish_reason is not None:
            self.ended[request_id] = detail

    def run(self, limit: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.engine.has_work:
                assert self.runner.num_read == len(self.runner.batches), "a step was forgotten"
                return
            self.step()
        raise AssertionError(f"still working after {limit} steps")


INFO = ModelInfo(
    max_model_len=0,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=[EOS],
    num_blocks=0,
    block_size=0,
    max_num_seqs=0,
    dtype="none",
    device="none",
    weight_bytes=0,
    kv_cache_bytes=0,
    load_seconds=0.0,
    kernels={},
)


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
        overlaps: bool = False,
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
        runner = PretendRunner(running, num_blocks, block_size, overlaps=overlaps)
        runner.on_launch = scheduler.check_invariants
        return Harness(Engine(scheduler, runner, INFO), scheduler, runner, running, kv_cache)

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
