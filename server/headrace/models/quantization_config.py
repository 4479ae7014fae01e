"""quantization_config of config.json -> Scheme. What cannot be computed is refused here, by name.

Formats: AutoGPTQ and GPTQModel (gptq), AutoAWQ (awq), compressed-tensors, and the fp8 of
DeepSeek-V3 and Qwen3 (Hugging Face's FineGrainedFP8Config). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NoReturn

from headrace.errors import CheckpointError
from headrace.models.fields import Fields
from headrace.quantization.method import BLOCK
from headrace.quantization.scheme import Scheme
from headrace_kernels.packed_format import GROUP


def quantization_scheme(config: Fields) -> Scheme | None:
    """The scheme of a checkpoint; None if its weights are floats.

    Raises CheckpointError, with the nearest thing that works, for one that is not supported.
    """
    section = config.section("quantization_config") or config.section("compression_config")
    if section is None:
        return None
    method = section.text("quant_method", "unknown")
    if method not in _READERS:
        _refuse(
            f"The weights are quantized by {method!r}, which is not supported",
            f"a checkpoint in {', '.join(_READERS)} or GGUF",
        )
    return _READERS[method](section)


def _gptq(section: Fields) -> Scheme:
    bits = section.integer("bits")
    if bits not in (4, 8):
        _refuse(f"GPTQ weights of {bits} bits ('bits') are not supported", "one of 4 or 8 bits")
    checkpoint_format = section.text("checkpoint_format", "gptq")
    if section.flag("is_marlin_format", False):
        checkpoint_format = "marlin"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        _refuse(
            f"GPTQ's 'checkpoint_format' {checkpoint_format!r} is not supported", "gptq or gptq_v2"
        )
    if section.section("dynamic") is not None:
        _refuse("GPTQ with other bits in some layers ('dynamic') is not supported", "one for all")
    group_size = _group_size(section, section.raw("group_size"))
    ordered = section.flag("desc_act", False) and group_size is not None
    return Scheme(
        method="gptq",
        layout="gptq",
        dtype="int4" if bits == 4 else "int8",
        group_size=group_size,
        symmetric=section.flag("sym", True),
        zero_offset=1 if checkpoint_format == "gptq" else 0,
        ordered=ordered,
        weight_only=True,
    )


def _awq(section: Fields) -> Scheme:
    if (bits := section.integer("bits", 4)) != 4:
        _refuse(f"AWQ weights of {bits} bits ('bits') are not supported", "one of 4 bits")
    version = section.text("version", section.text("format", "gemm")).lower()
    if version != "gemm":
        _refuse(f"AWQ's 'version' {version!r} is not supported", "one packed for gemm")
    if not section.flag("zero_point", True):
        _refuse("AWQ without zero points ('zero_point') is not supported", "one that has them")
    return Scheme(
        method="awq",
        layout="awq",
        dtype="int4",
        group_size=_group_size(section, section.raw("group_size")),
        symmetric=False,
        weight_only=True,
    )


def _fp8(section: Fields) -> Scheme:
    if (fmt := section.text("fmt", "e4m3")) != "e4m3":
        _refuse(f"fp8 weights in 'fmt' {fmt!r} are not supported", "one in e4m3")
    scheme = section.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        _refuse(f"The 'activation_scheme' {scheme!r} is not supported", "dynamic or static")
    blocks = section.raw("weight_block_size")
    _check_blocks(section, "weight_block_size", blocks)
    return Scheme(method="fp8", layout="rows", dtype="e4m3", of_blocks=blocks is not None)


def _compressed_tensors(section: Fields) -> Scheme:
    for key in ("sparsity_config", "transform_config"):
        extra = section.section(key)
        if extra is not None and extra.raw("format") != "dense":
            _refuse(f"compressed-tensors with a {key!r} is not supported", "one without")
    groups = section.section("config_groups")
    entries = [] if groups is None else [groups.section(name) for name in _names(section)]
    schemes = {_compressed_group(section, entry) for entry in entries if entry is not None}
    if len(schemes) != 1:
        names = "; ".join(sorted(scheme.label for scheme in schemes)) or "none"
        _refuse(
            f"'config_groups' must have one scheme for all layers, and has {names}", "one for all"
        )
    return schemes.pop()


def _compressed_group(section: Fields, group: Fields) -> Scheme:
    weights = group.section("weights")
    if weights is None:
        _refuse(f"{group.source} has no 'weights': its scheme is not known", "one that has")
    activations = group.section("input_activations")
    fmt = group.text("format", section.text("format"))
    bits, kind = weights.integer("num_bits"), weights.text("type", "int")
    strategy = weights.text("strategy", "tensor")
    what = f"compressed-tensors {fmt!r} with {kind} weights of {bits} bits, strategy {strategy!r},"
    if (order := weights.raw("actorder")) not in (None, False, "weight", "static"):
        _refuse(
            f"compressed-tensors with 'actorder' {order!r} is not supported",
            "actorder weight, or none",
        )
    if activations is not None and activations.integer("num_bits") != 8:
        bits = activations.integer("num_bits")
        _refuse(f"{what} and activations of {bits} bits is not supported", "8 or 16 bits")
    symmetric = weights.flag("symmetric", True)
    if fmt == "pack-quantized" and kind == "int" and bits in (4, 8):
        if strategy not in ("group", "channel") or activations is not None:
            _refuse(f"{what} is not supported", "groups or channels, and 16-bit activations")
        return Scheme(
            method="compressed-tensors",
            layout="packed",
            dtype="int4" if bits == 4 else "int8",
            group_size=_group_size(weights, weights.raw("group_size")),
            symmetric=symmetric,
            weight_only=True,
        )
    dtype: Literal["int8", "e4m3"] = "int8" if kind == "int" else "e4m3"
    strategies = ("tensor", "channel") if dtype == "int8" else ("tensor", "channel", "block")
    formats = ("int-quantized", "float-quantized", "naive-quantized")
    if bits != 8 or not symmetric or fmt not in formats or strategy not in strategies:
        _refuse(
            f"{what} is not supported",
            "pack-quantized int4 or int8, int-quantized int8 or float-quantized fp8",
        )
    if strategy == "block":
        _check_blocks(weights, "block_structure", weights.raw("block_structure"))
    return Scheme(
        method="compressed-tensors",
        layout="rows",
        dtype=dtype,
        of_blocks=strategy == "block",
        weight_only=activations is None,
    )


def _names(section: Fields) -> list[str]:
    groups = section.raw("config_groups")
    return list(groups) if isinstance(groups, Mapping) else []


def _group_size(section: Fields, size: object) -> int | None:
    """None, -1: all inputs of an output."""
    if size in (None, -1):
        return None
    if not isinstance(size, int) or size < 1 or size % GROUP:
        _refuse(
            f"{section.source}: a 'group_size' of {size!r} is not supported",
            f"a multiple of {GROUP}, such as 128, or -1",
        )
    return size


def _check_blocks(section: Fields, key: str, blocks: object) -> None:
    if blocks is not None and blocks != [BLOCK, BLOCK]:
        _refuse(f"{section.source}: {key!r} {blocks!r} is not supported", f"[{BLOCK}, {BLOCK}]")


def _refuse(problem: str, instead: str) -> NoReturn:
    raise CheckpointError(
        f"{problem}. Use {instead}, or the unquantized checkpoint, with --quantization fp8 or int8 "
        "to make it smaller."
    )


_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
