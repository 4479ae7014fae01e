"""Quantized layers as checkpoints store them, written from the formats' public descriptions.

Plain and slow on purpose: words are put together value by value, not by the code that takes them
apart. Formats: AutoGPTQ's QuantLinear, AutoAWQ's WQLinear_GEMM, compressed-tensors' packed and
naive compressors, and the fp8 of DeepSeek-V3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of each eight columns, the one that is in the first, second, ... four bits of a word."""
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Layer:
    """The tensors of a layer, without its name, and the weights [Out, In] that they stand for."""

    parts: dict[str, Tensor]
    dense: Tensor


Write = Callable[[Tensor], Layer]


def _groups(weight: Tensor, size: int | None) -> Tensor:
    """[In]: the group of each input."""
    return torch.arange(weight.shape[1]) // (size or weight.shape[1])


def _round(
    weight: Tensor, group: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, least_zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [Out, In] and, for each group, scales and zero points [Out, G]."""
    top, count = (1 << bits) - 1, int(group.max()) + 1
    scale = torch.zeros(len(weight), count)
    zero = torch.full((len(weight), count), 1 << (bits - 1))
    for index in range(count):
        own = weight[:, group == index]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        if symmetric:
            scale[:, index] = own.abs().amax(1) / (top // 2)
        else:
            scale[:, index] = (high - low) / top
            zero[:, index] = (-low / scale[:, index]).round().clamp(least_zero, top)
    scale = scale.to(dtype).float()
    integers = ((weight / scale[:, group]).round() + zero[:, group]).clamp(0, top)
    return integers.to(torch.int64), scale, zero


def words(values: Tensor, bits: int) -> Tensor:
    """[R, C] unsigned -> [R, ceil(C * bits / 32)] int32, the first value in the lowest bits."""
    per_word = 32 // bits
    rows = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    rows = rows.view(len(values), -1, per_word)
    packed = sum(rows[..., i] << (bits * i) for i in range(per_word))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(
    size: int | None = 128,
    *,
    bits: int = 4,
    symmetric: bool = True,
    offset: int = 1,
    ordered: bool = False,
) -> Write:
    def write(weight: Tensor) -> Layer:
        group = _groups(weight, size)
        if ordered:
            group = group[torch.randperm(len(group))]
        integers, scale, zero = _round(weight, group, bits, symmetric, torch.float16, offset)
        parts = {
            "qweight": words(integers, bits).t(),
            "qzeros": words((zero - offset).t(), bits),
            "scales": scale.t().contiguous().half(),
            "g_idx": group.to(torch.int32),
        }
        return Layer(parts, (integers - zero[:, group]) * scale[:, group])

    return write


def awq(size: int | None = 128) -> Write:
    def write(weight: Tensor) -> Layer:
        group = _groups(weight, size)
        integers, scale, zero = _round(weight, group, 4, False, torch.float16, 0)

        def interleaved(values: Tensor) -> Tensor:
            columns = values.view(len(values), -1, 8)
            return words(columns[..., list(AWQ_COLUMNS)].flatten(1), 4)

        parts = {
            "qweight": interleaved(integers.t().contiguous()),
            "qzeros": interleaved(zero.t().contiguous()),
            "scales": scale.t().contiguous().half(),
        }
        return Layer(parts, (integers - zero[:, group]) * scale[:, group])

    return write


def packed(
    size: int | None = 128,
    *,
    bits: int = 4,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Write:
    def write(weight: Tensor) -> Layer:
        group = _groups(weight, size)
        integers, scale, zero = _round(weight, group, bits, symmetric, dtype, 0)
        parts = {
            "weight_packed": words(integers, bits),
            "weight_scale": scale.to(dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zero.t().contiguous(), bits).t().contiguous()
        return Layer(parts, (integers - zero[:, group]) * scale[:, group])

    return write


def rows(dtype: torch.dtype, strategy: str = "channel", scale_name: str = "weight_scale") -> Write:
    """8-bit rows; strategy: tensor, channel or block, as compressed-tensors calls them."""

    def write(weight: Tensor) -> Layer:
        limit = 448.0 if dtype == E4M3 else 127.0
        if strategy == "tensor":
            scale = whole = (weight.abs().amax() / limit).reshape(())
        elif strategy == "channel":
            scale = whole = weight.abs().amax(1, keepdim=True) / limit
        else:
            scale = torch.zeros(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                    scale[i, j] = block.abs().amax() / limit
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            whole = whole[: weight.shape[0], : weight.shape[1]]
        values = (weight / whole).clamp(-limit, limit)
        values = (values if dtype == E4M3 else values.round()).to(dtype)
        return Layer({"weight": values, scale_name: scale}, values.float() * whole)

    return write


@dataclass(frozen=True)
class Case:
    """A scheme as a file and its config have it."""

    write: Write
    config: dict[str, Any]


def _compressed(fmt: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def gptq_config(size: int = 128, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True}
    return config | {"desc_act": False, "checkpoint_format": "gptq"} | changes


def awq_config(size: int = 128, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    return config | {"version": "gemm", "modules_to_not_convert": None} | changes


def packed_config(size: int | None = 128, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": size}
    weights |= {"strategy": "channel" if size is None else "group", "actorder": None}
    return _compressed("pack-quantized", weights | changes, None)  # type: ignore[no-any-return]


def rows_config(kind: str, strategy: str = "channel", **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token"}
    fmt = "float-quantized" if kind == "float" else "int-quantized"
    return _compressed(fmt, weights | changes, activations | {"dynamic": True})  # type: ignore[no-any-return]


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

CASES = {
    "gptq 128": Case(gptq(128), gptq_config(128)),
    "gptq 32": Case(gptq(32), gptq_config(32)),
    "gptq rows": Case(gptq(None), gptq_config(-1)),
    "gptq asym": Case(gptq(64, symmetric=False), gptq_config(64, sym=False)),
    "gptq v2": Case(
        gptq(64, symmetric=False, offset=0),
        gptq_config(64, sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq 8 bits": Case(gptq(128, bits=8), gptq_config(128, bits=8)),
    "gptq ordered": Case(gptq(64, ordered=True), gptq_config(64, desc_act=True)),
    "awq 128": Case(awq(128), awq_config(128)),
    "awq 32": Case(awq(32), awq_config(32)),
    "awq rows": Case(awq(None), awq_config(-1)),
    "packed 128": Case(packed(128), packed_config(128)),
    "packed rows": Case(packed(None), packed_config(None)),
    "packed asym": Case(packed(32, symmetric=False), packed_config(32, symmetric=False)),
    "packed 8 bits": Case(packed(128, bits=8), packed_config(128, num_bits=8)),
    "int8": Case(rows(torch.int8), rows_config("int")),
    "fp8 tensor": Case(rows(E4M3, "tensor"), rows_config("float", "tensor")),
    "fp8 channel": Case(rows(E4M3), rows_config("float")),
    "fp8 block": Case(rows(E4M3, "block"), rows_config("float", "block")),
    "fp8 block inverse": Case(rows(E4M3, "block", "weight_scale_inv"), BLOCKS),
}


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    case: Case,
    *,
    skip: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Quantize the layers' matrices of a model and write its folder.

    Returns the state that it stands for. `skip`: parts of names that stay as they are.
    """
    stored, dense = {}, {}
    for name, value in state.items():
        is_layer = name.startswith("model.layers.") and value.ndim == 2
        if not is_layer or any(part in name for part in skip):
            stored[name] = value.contiguous()
            dense[name] = value.float()
            continue
        layer = case.write(value.float())
        module = name.removesuffix("weight")
        stored |= {module + part: tensor.contiguous() for part, tensor in layer.parts.items()}
        dense[name] = layer.dense
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    text = json.dumps({**config, "quantization_config": case.config})
    (folder / "config.json").write_text(text)
    return dense
