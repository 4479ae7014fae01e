"""Scheme: how a checkpoint of safetensors files stores quantized weights. Imports no torch.

models/quantization_config.py reads it from config.json; stored_weight.py finds the tensors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from headrace.quantization.method import BLOCK, Format, ScaledFormat
from headrace_kernels.packed_format import GROUP, PackedFormat

LOAD_TIME: dict[str, Literal["int8", "e4m3"]] = {"fp8": "e4m3", "int8": "int8"}
"""Values of --quantization and what they mean."""
Layout = Literal["gptq", "awq", "packed", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One for all quantized layers; which those are, the tensors show."""

    method: str
    """Hugging Face's quant_method."""
    layout: Layout
    """Where the bits are: of GPTQ, of AWQ, packed by compressed-tensors, or plain 8-bit rows."""
    dtype: Literal["int4", "int8", "e4m3"]
    group_size: int | None = None
    """Inputs that share a scale; None: all of a row, or those of a block."""
    of_blocks: bool = False
    """A scale for each 128 x 128 weights."""
    symmetric: bool = True
    """No zero points are stored, or all are in the middle."""
    zero_offset: int = 0
    """What is added to stored zero points: 1 in GPTQ's first format."""
    ordered: bool = False
    """The group of an input is looked up (GPTQ's desc_act)."""
    weight_only: bool = False
    """Activations are not meant to get 8 bits."""

    @property
    def bits(self) -> int:
        return 4 if self.dtype == "int4" else 8

    @property
    def label(self) -> str:
        """For people: "awq int4, groups of 128"."""
        scales = "a scale for each 128 x 128" if self.of_blocks else "a scale for each output"
        if self.group_size is not None:
            scales = f"groups of {self.group_size}"
        activations = "" if self.weight_only else ", 8-bit activations"
        return f"{self.method} {self.dtype}, {scales}{activations}"

    def packed_format(
        self, shape: tuple[int, ...], *, scales_are_fp16: bool, exact: bool = False
    ) -> PackedFormat | None:
        """The packed form that holds a matrix of these integers; None if none does.

        A weight is s * (u - z): its scale s is kept in fp16, and so is its minimum -s * z, which
        errs by at most 2^-11 of itself: less than 1% of a step of 4-bit weights. `exact` asks for
        fp32 where fp16 may round at all.
        """
        if self.dtype == "e4m3" or self.of_blocks or self.ordered:
            return None
        if len(shape) != 2 or shape[1] % GROUP:
            return None
        fmt = PackedFormat(self.bits, has_minimum=not self.symmetric)
        if exact and not (self.symmetric and scales_are_fp16):
            fmt = dataclasses.replace(fmt, has_minimum=True, scale_bits=32)
        return fmt

    def scaled_format(self, shape: tuple[int, ...]) -> ScaledFormat | None:
        """The form of 8-bit products with 8-bit activations; None if there is none."""
        if self.layout != "rows" or self.weight_only or self.dtype == "int4":
            return None
        if self.of_blocks and shape[1] % BLOCK:
            return None
        return ScaledFormat(self.dtype, self.of_blocks)

    def why_dense(self, shape: tuple[int, ...]) -> str:
        """Why a matrix has neither form."""
        if self.ordered:
            return "its groups are of inputs in another order (desc_act)"
        if self.of_blocks:
            return f"its {shape[1]} inputs are not a multiple of {BLOCK}"
        if self.dtype == "e4m3":
            return "its activations are not meant to get 8 bits"
        return f"its {shape[1]} inputs are not a multiple of {GROUP}"


def load_time_format(
    quantization: str, name: str, shape: tuple[int, ...], *, packed: bool
) -> Format | None:
    """The form of a weight that --quantization rounds as it is loaded; None if it does not.

    It rounds the matrices of decoder layers. Packed ones have a scale a row too, which is repeated.
    """
    if not name.startswith("model.layers.") or len(shape) != 2 or shape[1] % GROUP:
        return None
    if not packed:
        return ScaledFormat(LOAD_TIME[quantization])
    return PackedFormat(8, has_minimum=False) if quantization == "int8" else None
