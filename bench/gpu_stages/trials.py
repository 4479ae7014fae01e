"""Random inputs for each stem, and what its ops have to make of them.

Inputs are rounded to the type that the kernel reads; what is expected is computed from those in
fp32 or fp64. Outputs are poisoned: what a kernel forgets to write is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from bench.gpu_stages.machine import Machine
from torch import Tensor

from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.kv_format import row_size, values_and_scales
from headrace_kernels.ops.step_inputs import SAMPLING_WORDS
from headrace_kernels.packed_format import FORMATS
from headrace_kernels.reference import activation as reference_activation
from headrace_kernels.reference import norm as reference_norm
from headrace_kernels.reference import quantization as reference_quantization
from headrace_kernels.reference import rope as reference_rope
from headrace_kernels.reference import sampling as reference_sampling
from headrace_kernels.reference import step_inputs as reference_step_inputs
from headrace_kernels.testing import (
    TOLERANCES,
    Tolerance,
    expected_attention,
    poisoned,
    ragged_batch,
    random_cache,
    random_packed,
)

Option = TypeVar("Option")
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Trial:
    shape: str
    """For people."""
    call: Callable[[KernelSet], Sequence[Tensor]]
    """Runs the op into fresh outputs."""
    expected: Sequence[Tensor]
    tolerance: Tolerance | None
    """None: equal to the bit."""
    head_dim: int = 128
    page_size: int = 64
    of_rows: Callable[[KernelSet, slice], Sequence[Tensor]] | None = None
    """Runs the op on these rows alone, which a batch-invariant kernel gives the same bits."""
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    """Of candidates that round what others do not."""


class Draw:
    """Random choices and tensors of one trial."""

    def __init__(self, machine: Machine, generator: torch.Generator) -> None:
        self.machine, self._generator = machine, generator

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        made = torch.randint(low, high + 1, (), generator=self._generator, device=self.device)
        return int(made)

    def one_of(self, options: Sequence[Option]) -> Option:
        return options[self.integer(0, len(options) - 1)]

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def rows(self) -> int:
        """T: often few, sometimes many."""
        return self.integer(1, self.one_of([8, 70, self.machine.size(3000, 20)]))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return made.to(dtype or self.machine.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator, device=self.device)

    def rng(self) -> np.random.Generator:
        """For the generators of headrace_kernels.testing."""
        torch.manual_seed(self.integer(0, 2**31))
        return np.random.default_rng(self.integer(0, 2**31))

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return poisoned(*shape, dtype=dtype or self.machine.dtype, device=str(self.device))


def _tolerance(stem: str) -> Tolerance:
    """That of bfloat16 holds for float16, which is finer."""
    return TOLERANCES[stem, torch.bfloat16]


def _rows(draw: Draw, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Poisoned rows of 8 bits and their scales: one a row or one each 128 values."""
    dtype = draw.one_of(EIGHT_BITS)
    groups = width // 128 if width % 128 == 0 and draw.integer(0, 1) else 1
    out = torch.full((rows, width), 0x7F, dtype=torch.int8, device=draw.device).view(dtype)
    return out, draw.poisoned(rows, groups, dtype=torch.float32)


def _beyond_half_a_step(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """By how many steps rows [T, In] with scales [T, G] are further from x than rounding brings,
    and x in another order of fp32 operations."""
    wanted = x.float() / scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
    half = wanted.abs().clamp(min=2**-6) / 16 if rows.dtype != torch.int8 else 0.5
    return ((rows.float() - wanted).abs() - half - 2e-3).clamp(min=0)


def _norm(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    rows, width = draw.rows(), draw.one_of([576, 1024, 4096, 80]) if not machine.dry_run else 96
    x, weight = draw.normal(rows, width), draw.normal(width, dtype=torch.float32)
    residual = draw.normal(rows, width, dtype=torch.float32)
    eight_bits, scale = _rows(draw, rows, width)

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        out, added, stream = (
            draw.poisoned(rows, width),
            draw.poisoned(rows, width),
            residual.clone(),
        )
        kernels.rms_norm(x, weight, 1e-5, out)
        kernels.add_rms_norm(x, residual.clone(), weight, 1e-5, eight_bits, scale)
        kernels.add_rms_norm(x, stream, weight, 1e-5, added)
        return out, added, stream, _beyond_half_a_step(expected[1], eight_bits, scale)

    expected = [torch.empty_like(residual) for _ in range(2)]
    stream = residual.clone()
    reference_norm.rms_norm(x, weight, 1e-5, expected[0])
    reference_norm.add_rms_norm(x, stream, weight, 1e-5, expected[1])
    shape = f"{rows} x {width}, {eight_bits.dtype} {list(scale.shape)}"
    expected.extend((stream, torch.zeros(rows, width)))
    return Trial(shape, call, expected, _tolerance("norm"))


def _activation(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    rows, width = draw.rows(), draw.one_of([1536, 3072, 14336]) if not machine.dry_run else 48
    gate_up = draw.normal(rows, 2 * width)
    eight_bits, scale = _rows(draw, rows, width)

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        out = draw.poisoned(rows, width)
        kernels.silu_and_mul(gate_up, out)
        kernels.silu_and_mul(gate_up, eight_bits, scale)
        return out, _beyond_half_a_step(expected, eight_bits, scale)

    expected = torch.empty(rows, width, device=draw.device)
    reference_activation.silu_and_mul(gate_up.float(), expected)
    shape = f"{rows} x {width}, {eight_bits.dtype} {list(scale.shape)}"
    zeros = torch.zeros(rows, width)
    return Trial(shape, call, (expected, zeros), _tolerance("activation"))


def _quantization(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    rows, groups = draw.rows(), draw.one_of([1, 4, 32]) if not machine.dry_run else 2
    width, dtype = 128 * groups * draw.integer(1, 3), draw.one_of(EIGHT_BITS)
    x = draw.normal(rows, width)

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        out = torch.full((rows, width), 7, dtype=torch.int8, device=draw.device).view(dtype)
        scale = draw.poisoned(rows, groups, dtype=torch.float32)
        kernels.quantize_rows(x, out, scale)
        return out, scale

    out = torch.empty(rows, width, dtype=dtype, device=draw.device)
    scale = torch.empty(rows, groups, device=draw.device)
    reference_quantization.quantize_rows(x, out, scale)
    return Trial(f"{rows} x {width} / {groups} {dtype}", call, (out, scale), None)


def _embedding(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    rows, vocabulary, width = draw.rows(), machine.size(49152, 300), draw.one_of([576, 1024])
    table, ids = draw.normal(vocabulary, width), draw.integers(vocabulary, rows)

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        out = draw.poisoned(rows, width, dtype=torch.float32)
        kernels.embedding(ids, table, out)
        return (out,)

    return Trial(f"{rows} of {vocabulary} x {width}", call, (table[ids].float(),), None)


def _heads(draw: Draw) -> tuple[int, int, int]:
    """(H, K, D)"""
    if draw.machine.dry_run:
        return draw.one_of([(4, 2, 16), (3, 1, 32)])
    return draw.one_of([(9, 3, 64), (32, 8, 128), (16, 8, 128), (40, 8, 128), (6, 6, 80)])


def _rope(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    (heads, kv_heads, dim), rows, page = _heads(draw), draw.rows(), 64
    positions, blocks = draw.integers(500, rows), rows // page + 2
    slots = torch.randperm(blocks * page, device=draw.device)[:rows]
    slots[draw.uniform(rows) < 0.1] = -1
    cos_sin = draw.normal(500, 2, dim // 2, dtype=torch.float32)
    qkv = draw.normal(rows, (heads + 2 * kv_heads) * dim)
    norms = [draw.normal(dim, dtype=torch.float32) if draw.integer(0, 1) else None] * 2
    draw.rng()
    cache = random_cache(blocks, kv_heads, page, dim, dtype=machine.dtype).to(draw.device)
    kv_dtype, at = draw.one_of(EIGHT_BITS), slots[slots >= 0]
    eight_bits = torch.zeros(
        (blocks, 2, kv_heads, page, row_size(dim, kv_dtype)), dtype=kv_dtype, device=draw.device
    )

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        written, q = cache.clone(), draw.poisoned(rows, heads, dim)
        kernels.rope_and_write_kv(qkv, positions, cos_sin, eight_bits, slots, q, *norms, 1e-5)
        q.fill_(float("nan"))
        kernels.rope_and_write_kv(qkv, positions, cos_sin, written, slots, q, *norms, 1e-5)
        values, scales = values_and_scales(eight_bits)
        assert scales is not None
        stored = values.float().permute(0, 3, 1, 2, 4)[at // page, at % page].reshape(-1, dim)
        scale = scales.permute(0, 3, 1, 2)[at // page, at % page].reshape(-1, 1)
        return q, written, _beyond_half_a_step(wanted, stored.to(kv_dtype), scale)

    q, written = torch.empty(rows, heads, dim, device=draw.device), cache.float()
    reference_rope.rope_and_write_kv(
        qkv.float(), positions, cos_sin, written, slots, q, *norms, 1e-5
    )
    wanted = written.permute(0, 3, 1, 2, 4)[at // page, at % page].reshape(-1, dim)
    shape = f"{rows} x {heads}/{kv_heads}/{dim}, norms {norms[0] is not None}, {kv_dtype}"
    expected = q, written, torch.zeros(wanted.shape)
    return Trial(shape, call, expected, _tolerance("rope"), dim, page)


def _attention(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    heads, kv_heads, dim = _heads(draw)
    longest = machine.size(draw.one_of([200, 3000]), 90)
    decodes = draw.integer(0, 1)  # a kernel may have a path of its own for steps of these alone
    lengths = []
    for _ in range(draw.integer(1, machine.size(24, 3))):
        length = draw.integer(1, longest)
        longer = 1 if decodes else draw.integer(1, min(length, 700))
        lengths.append((draw.one_of([1, 1, 0, longer]), length))
    window = draw.one_of([None, None, draw.integer(1, longest)])
    soft_cap = draw.one_of([None, None, 20.0])
    rng, kv_dtype = draw.rng(), draw.one_of([machine.dtype, *EIGHT_BITS])
    batch = ragged_batch(lengths, 64, rng)
    cache = random_cache(batch.num_blocks, kv_heads, 64, dim, dtype=kv_dtype)
    q = torch.randn(batch.num_rows, heads, dim).to(machine.dtype)
    own_q, own_cache = q.to(draw.device), cache.to(draw.device)

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        out = draw.poisoned(*q.shape)
        metadata = batch.metadata(str(draw.device))
        kernels.paged_attention(own_q, own_cache, metadata, dim**-0.5, window, soft_cap, out)
        return (out,)

    expected = expected_attention(q, cache, batch, window, soft_cap)
    shape = f"{lengths} {heads}/{kv_heads}/{dim} {kv_dtype} window {window} cap {soft_cap}"
    return Trial(shape, call, (expected,), _tolerance("attention"), dim, 64)


def _kv_copy(machine: Machine, generator: torch.Generator) -> Trial:
    """Within a pool's device, out to host memory, and back in."""
    draw = Draw(machine, generator)
    blocks, tokens = draw.integer(4, 40), draw.one_of([16, 64, machine.size(4096, 64)])
    src = draw.normal(blocks, 2, 3, tokens, 16)
    numbers = torch.stack([torch.randperm(blocks), torch.randperm(blocks)], 1)
    pairs = torch.cat((numbers[: draw.integer(1, blocks)], torch.tensor([[-1, 2], [3, -1]])))

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        own, back = torch.zeros_like(src), torch.zeros_like(src)
        host = torch.zeros(src.shape, dtype=src.dtype, pin_memory=draw.device.type == "cuda")
        kernels.copy_blocks(src, own, pairs.to(draw.device))
        kernels.copy_blocks(src, host, pairs)
        kernels.copy_blocks(host, back, pairs.flip(1))
        return own, host, back

    copied, back = torch.zeros_like(src), torch.zeros_like(src)
    for source, target in pairs.tolist()[:-2]:
        copied[target] = src[source]
        back[source] = src[source]
    return Trial(f"{len(pairs)} of {blocks} x {tokens}", call, (copied, copied, back), None)


def _matrix(draw: Draw) -> tuple[int, int]:
    """(Out, In)"""
    if draw.machine.dry_run:
        return draw.one_of([(48, 128), (200, 256)])
    return draw.one_of([(960, 576), (576, 1536), (6144, 4096), (4096, 14336), (1000, 256)])


def _linear(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    (outputs, inputs), rows = _matrix(draw), draw.rows()
    x, weight = draw.normal(rows, inputs), draw.normal(outputs, inputs)
    bias = draw.normal(outputs) if draw.integer(0, 1) else None
    out_dtype = draw.one_of([machine.dtype, torch.float32])

    def of_rows(kernels: KernelSet, own: slice) -> Sequence[Tensor]:
        out = draw.poisoned(rows, outputs, dtype=out_dtype)[own]
        kernels.linear(x[own], weight, bias, out)
        return (out,)

    expected = x.double() @ weight.double().t()
    expected = expected if bias is None else expected + bias
    shape = f"{rows} x {inputs} -> {outputs}"
    return _product(shape, of_rows, (expected,), _of_sums("linear", inputs))


def _product(
    shape: str,
    of_rows: Callable[[KernelSet, slice], Sequence[Tensor]],
    expected: Sequence[Tensor],
    tolerance: Tolerance,
    tolerances: Mapping[str, Tolerance] | None = None,
) -> Trial:
    return Trial(
        shape,
        lambda kernels: of_rows(kernels, slice(None)),
        expected,
        tolerance,
        of_rows=of_rows,
        tolerances=tolerances or {},
    )


def _of_sums(stem: str, inputs: int) -> Tolerance:
    """A sum of `inputs` products of unit size has a size of sqrt(inputs)."""
    base = _tolerance(stem)
    return Tolerance(base.absolute + 2e-6 * inputs, base.relative, base.reason)


def _scaled_linear(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    (outputs, inputs), rows, dtype = _matrix(draw), draw.rows(), draw.one_of(EIGHT_BITS)
    blocks = draw.integer(0, 1) if inputs % 128 == 0 else 0
    x = torch.empty(rows, inputs, dtype=dtype, device=draw.device)
    x_scale = torch.empty(rows, inputs // 128 if blocks else 1, device=draw.device)
    reference_quantization.quantize_rows(draw.normal(rows, inputs), x, x_scale)
    weight = torch.empty(outputs, inputs, dtype=dtype, device=draw.device)
    weight_scale = torch.empty(outputs, 1, device=draw.device)
    reference_quantization.quantize_rows(draw.normal(outputs, inputs), weight, weight_scale)
    if blocks:
        weight_scale = 0.02 * (0.5 + draw.uniform(-(-outputs // 128), inputs // 128))

    def of_rows(kernels: KernelSet, own: slice) -> Sequence[Tensor]:
        out = draw.poisoned(rows, outputs)[own]
        kernels.scaled_linear(x[own], x_scale[own], weight, weight_scale, None, out)
        return (out,)

    by_row = x.double().view(*x_scale.shape, -1) * x_scale.double().unsqueeze(-1)
    scale = weight_scale.double()
    if blocks:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:outputs]
    expected = by_row.flatten(-2) @ (weight.double() * scale).t()
    shape = f"{rows} x {inputs} -> {outputs} {dtype} blocks {blocks}"
    tolerance = _of_sums("linear", inputs)
    if dtype == torch.float8_e4m3fn:
        # DeepSeek-V3, arXiv 2412.19437, section 3.3.2: up to 2 % where all of K is summed so.
        size = float(expected.square().mean().sqrt())
        reason = "tensor cores of sm_90 keep 14 bits of a sum of 128 products"
        tolerance = Tolerance(tolerance.absolute + 2**-8 * size, tolerance.relative, reason)
    return _product(shape, of_rows, (expected,), tolerance)


def _quantized_linear(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    (outputs, inputs), rows, fmt = _matrix(draw), draw.rows(), draw.one_of(FORMATS)
    draw.rng()
    packed, dense = random_packed(fmt, outputs, inputs)
    packed, dense = packed.to(draw.device), dense.to(draw.device)
    x = draw.normal(rows, inputs)
    ids = draw.integers(outputs, rows)

    def of_rows(kernels: KernelSet, own: slice) -> Sequence[Tensor]:
        out = draw.poisoned(rows, outputs)[own]
        table = draw.poisoned(rows, inputs, dtype=torch.float32)[own]
        kernels.quantized_linear(x[own], packed, fmt, 16, None, out)
        kernels.quantized_embedding(ids[own], packed, fmt, table)
        return out, table

    expected = (x.bfloat16().double() @ dense.t(), dense[ids])  # as the op says of 16 bits
    shape = f"{rows} x {inputs} -> {outputs} {fmt}"
    base = _of_sums("linear", inputs)
    # Weights of unit size err by up to 2^-8, in sums of random signs.
    rounded = Tolerance(
        base.absolute + 8 * 2**-8 * inputs**0.5, base.relative, "weights are rounded to bf16"
    )
    return _product(shape, of_rows, expected, base, {"cublas": rounded})


def _sampling(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    rows, vocabulary = draw.integer(1, machine.size(40, 4)), machine.size(50_000, 300)
    logits = draw.normal(rows, vocabulary, dtype=torch.float32) * 4
    random = draw.uniform(rows)
    columns = {
        "temperature": torch.where(draw.uniform(rows) < 0.2, 0.0, 0.3 + draw.uniform(rows)),
        "top_k": torch.where(random < 0.4, draw.integers(100, rows), 0).int(),
        "top_p": torch.where(random > 0.3, 0.2 + 0.8 * draw.uniform(rows), 1.0).clamp(max=1.0),
        "min_p": torch.where(draw.uniform(rows) < 0.3, 0.05, 0.0),
        "seeds": draw.integers(2**40, rows),
        "positions": draw.integers(9000, rows),
    }
    chosen = draw.integers(vocabulary, rows)

    def sample(kernels: KernelSet) -> Sequence[Tensor]:
        out = torch.full((rows,), -7, dtype=torch.int64, device=draw.device)
        kernels.sample_tokens(logits, **columns, out=out)
        ids = torch.full((rows, 5), -7, dtype=torch.int64, device=draw.device)
        own, top = draw.poisoned(rows, dtype=torch.float32), draw.poisoned(rows, 5)
        kernels.token_logprobs(logits, chosen, own, ids, top.float())
        return out, ids

    out = torch.empty(rows, dtype=torch.int64)
    of_cpu = {name: column.cpu() for name, column in columns.items()}
    reference_sampling.sample_tokens(logits.cpu(), **of_cpu, out=out)
    ids = torch.empty(rows, 5, dtype=torch.int64)
    reference_sampling.token_logprobs(
        logits.cpu(), chosen.cpu(), torch.empty(rows), ids, torch.empty(rows, 5)
    )
    return Trial(f"{rows} x {vocabulary}", sample, (out, ids), None)


def _step_inputs(machine: Machine, generator: torch.Generator) -> Trial:
    draw = Draw(machine, generator)
    lengths = []
    for _ in range(draw.integer(1, machine.size(300, 20))):
        length = draw.integer(1, 700)
        lengths.append((draw.one_of([1, 1, 0, draw.integer(1, min(length, 40))]), length))
    metadata = ragged_batch(lengths, 64, draw.rng()).metadata(str(draw.device))
    tokens, rows = len(metadata.slot_mapping), len(lengths)
    sent = draw.integers(50_000, tokens).int().where(draw.uniform(tokens) < 0.5, -1)
    last = draw.integers(50_000, rows).int()
    sampling = torch.randperm(rows, device=draw.device)[: max(rows // 2, 1)].int()
    words = draw.integers(2**31, rows, SAMPLING_WORDS).int()

    def call(kernels: KernelSet) -> Sequence[Tensor]:
        made = [torch.full((tokens,), -7, device=draw.device) for _ in range(3)]
        dtypes = (torch.int64, torch.float32, torch.int32, *[torch.float32] * 2, *[torch.int64] * 2)
        columns = [torch.full(sampling.shape, 7, dtype=d, device=draw.device) for d in dtypes]
        starts, table = metadata.query_start_loc, metadata.block_table
        kernels.token_inputs(starts, metadata.seq_lens, sent, last, table, 64, *made)
        kernels.sampling_inputs(sampling, starts, metadata.seq_lens, words, *columns)
        kept = last.clone()
        kernels.put(sampling, columns[0], kept)
        return *made, *columns, kept

    expected = call(reference_step_inputs)  # type: ignore[arg-type]
    return Trial(f"{tokens} tokens of {rows} rows", call, expected, None)


TRIALS: Mapping[str, Callable[[Machine, torch.Generator], Trial]] = {
    "norm": _norm,
    "rope": _rope,
    "activation": _activation,
    "attention": _attention,
    "embedding": _embedding,
    "linear": _linear,
    "quantization": _quantization,
    "scaled_linear": _scaled_linear,
    "quantized_linear": _quantized_linear,
    "sampling": _sampling,
    "step_inputs": _step_inputs,
    "kv_copy": _kv_copy,
}
"""By stem; a stem without one fails its check."""
