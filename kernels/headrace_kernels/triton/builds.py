"""Build: one compilation of a Triton kernel, as data. Launchers and the compile gate share them.

Every module triton/<stem>.py has, beside the launchers of its ops,

    declines(facts: KernelFacts) -> str | None   why it cannot run on these facts
    builds(arch: str) -> Iterator[Build]         what it compiles for the models it is shipped for
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHES = ("sm_80", "sm_90", "sm_100")
"""What the gate compiles for."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is fixed when a kernel is compiled. Pointers are promised to be aligned to 16 bytes."""

    name: str
    """Of the shape and the configuration, unique within the stem."""
    kernel: Any
    """The function that @triton.jit made."""
    types: Mapping[str, str]
    """Its run-time arguments: "*bf16", "i32", "i64", "fp32", "tensordesc<bf16[64,128]>", ..."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Its constexpr arguments."""
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Others that Triton takes, such as enable_fp_fusion or launch_pdl."""
    expects: tuple[str, ...] = ()
    """What must stand in the PTX, such as "wgmma.mma_async" or "cp.async"."""
    max_registers: int = 255
