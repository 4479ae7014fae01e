"""Which quantized checkpoints are taken, by what name, and which are refused, with a way out."""

from __future__ import annotations

from typing import Any

import pytest
from tests.quantization.stored_layers import (
    BLOCKS,
    CASES,
    awq_config,
    gptq_config,
    packed_config,
    rows_config,
)

from headrace.errors import CheckpointError
from headrace.models.fields import Fields
from headrace.models.quantization_config import quantization_scheme
from headrace.quantization.scheme import Scheme


def read(config: dict[str, Any] | None) -> Scheme | None:
    return quantization_scheme(Fields({"quantization_config": config}, "config.json"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("gptq 128", "gptq int4, groups of 128"),
        ("gptq rows", "gptq int4, a scale for each output"),
        ("awq 32", "awq int4, groups of 32"),
        ("packed 8 bits", "compressed-tensors int8, groups of 128"),
        ("int8", "compressed-tensors int8, a scale for each output, 8-bit activations"),
        ("fp8 tensor", "compressed-tensors e4m3, a scale for each output, 8-bit activations"),
        ("fp8 block inverse", "fp8 e4m3, a scale for each 128 x 128, 8-bit activations"),
    ],
)
def test_schemes_have_names(name: str, label: str) -> None:
    scheme = read(CASES[name].config)
    assert scheme is not None
    assert scheme.label == label


def test_floats_have_none() -> None:
    assert read(None) is None
    assert read({}) is None


def test_older_keys_and_defaults() -> None:
    config = CASES["packed 128"].config
    fields = Fields({"compression_config": config}, "config.json")
    assert quantization_scheme(fields) == read(config)
    # As AutoFP8 wrote it: a scale for a tensor, and calibrated ones for activations.
    static = read({"quant_method": "fp8", "activation_scheme": "static"})
    assert static is not None
    assert (static.dtype, static.of_blocks, static.weight_only) == ("e4m3", False, False)
    assert read(awq_config() | {"version": "GEMM"}) == read(awq_config())
    order = packed_config(128, actorder="static")
    assert read(order) == read(packed_config(128))
    ordered = read(gptq_config(-1, desc_act=True))
    assert ordered is not None and not ordered.ordered, "one group needs no order"


def with_group(config: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    groups = {**config["config_groups"], "group_1": group}
    return {**config, "config_groups": groups}


PACKED = packed_config(128)
GROUP = PACKED["config_groups"]["group_0"]
FP4 = {**GROUP, "weights": {**GROUP["weights"], "type": "float"}}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quantized by 'hqq'.*gptq, awq, compressed-tensors, fp8 or GGUF"),
        ({"bits": 4}, "quantized by 'unknown'"),
        (gptq_config(bits=3), r"GPTQ weights of 3 bits \('bits'\).*one of 4 or 8 bits"),
        (gptq_config(16), "a 'group_size' of 16 is not supported. Use a multiple of 32"),
        (gptq_config(checkpoint_format="marlin"), "'checkpoint_format' 'marlin'.*gptq_v2"),
        (gptq_config(is_marlin_format=True), "'checkpoint_format' 'marlin'"),
        (gptq_config(dynamic={"x": {"bits": 8}}), r"other bits in some layers \('dynamic'\)"),
        (awq_config(bits=8), "AWQ weights of 8 bits"),
        (awq_config(version="gemv"), "AWQ's 'version' 'gemv' is not supported. Use .* gemm"),
        (awq_config(zero_point=False), r"AWQ without zero points \('zero_point'\)"),
        (BLOCKS | {"weight_block_size": [64, 64]}, r"\[64, 64\] is not supported. Use \[128, 128"),
        (BLOCKS | {"fmt": "e5m2"}, "fp8 weights in 'fmt' 'e5m2'"),
        (BLOCKS | {"activation_scheme": "none"}, "'activation_scheme' 'none'"),
        (packed_config(128, num_bits=2), "int weights of 2 bits, strategy 'group', is not supp"),
        (packed_config(128, actorder="group"), "'actorder' 'group' is not supported.*weight"),
        (rows_config("float", symmetric=False), "float weights of 8 bits.*is not supported"),
        (rows_config("int", "block"), "strategy 'block', is not supported"),
        (rows_config("float", "block", block_structure=[64, 128]), r"'block_structure' \[64, 128"),
        (PACKED | {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' with int weights"),
        (PACKED | {"format": "marlin-24"}, "'marlin-24'.*Use pack-quantized int4"),
        (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "a 'sparsity_config' is"),
        (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, "a 'transform_config' is"),
        (PACKED | {"config_groups": {}}, "must have one scheme for all layers, and has none"),
        (
            with_group(PACKED, {**GROUP, "weights": {**GROUP["weights"], "num_bits": 8}}),
            "one scheme .* has compressed-tensors int4, groups of 128; compressed-tensors int8",
        ),
        (with_group(PACKED, FP4), "float weights of 4 bits"),
        (
            PACKED | {"config_groups": {"group_0": {**GROUP, "input_activations": ACTIVATIONS}}},
            "Use groups or channels, and 16-bit activations",
        ),
        (
            rows_config("int")
            | {
                "config_groups": {
                    "group_0": {**GROUP, "input_activations": {**ACTIVATIONS, "num_bits": 4}}
                }
            },
            "and activations of 4 bits is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read(config)
    assert "or the unquantized checkpoint, with --quantization fp8 or int8" in str(refused.value)


def test_groups_of_one_scheme_and_ignored_layers_are_taken() -> None:
    config = with_group(PACKED, {**GROUP, "targets": ["re:.*mlp.*"]})
    assert read(config | {"ignore": ["lm_head", "re:.*o_proj"]}) == read(PACKED)
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    assert read(PACKED | {"kv_cache_scheme": kv}) == read(PACKED)
