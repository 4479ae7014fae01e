"""The tensors of a quantized layer, which a checkpoint stores side by side, as one weight.

Imports torch only when a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from headrace.errors import CheckpointError
from headrace.quantization.method import BLOCK
from headrace.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "rows": ("weight", "weight_scale", "weight_scale_inv"),
}
"""Names of a layer's tensors, the integers first. `weight_scale_inv` is a scale like the other."""
OPTIONAL = {"weight_shape", "weight_zero_point", "weight_scale", "weight_scale_inv"}
INTEGER_TYPES = {"gptq": "I32", "awq": "I32", "packed": "I32"}
ROW_TYPES = {"int8": "I8", "e4m3": "F8_E4M3"}

CALIBRATED = frozenset(
    f"{what}_{value}"
    for what in ("input", "output", "activation", "k", "v", "q", "prob")
    for value in ("scale", "zero_point")
)
"""Of activations and of the KV cache: left out, since those are scaled as they are (a scale for
each token, or for each token and head), which is at least as exact."""


class Part(Protocol):
    """loading.safetensors.SafetensorsTensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def load(self, device: torch.device | None = None) -> Tensor: ...

    def read_into(self, out: Tensor) -> None: ...


T = TypeVar("T", bound=Part)


class QuantizedWeight:
    """A quantized [Out, In] matrix, still on disk. Raises CheckpointError for parts that misfit."""

    def __init__(self, module: str, parts: Mapping[str, Part], scheme: Scheme) -> None:
        self.name = f"{module}.weight"
        self.parts = parts
        self.scheme = scheme
        self.nbytes = sum(part.nbytes for part in parts.values())
        integers = parts[PARTS[scheme.layout][0]]
        wanted = INTEGER_TYPES.get(scheme.layout, ROW_TYPES.get(scheme.dtype))
        if integers.dtype != wanted or len(integers.shape) != 2:
            self._refuse(integers, f"a matrix of {wanted}")
        rows, columns = integers.shape
        values = 32 // scheme.bits
        if scheme.layout == "gptq":
            self.shape = columns, rows * values
        elif scheme.layout == "awq":
            self.shape = columns * values, rows
        else:
            self.shape = rows, columns * (values if scheme.layout == "packed" else 1)
        self._check_scales()

    @property
    def scale(self) -> Part:
        for name in ("scales", "weight_scale", "weight_scale_inv"):
            if name in self.parts:
                return self.parts[name]
        raise CheckpointError(f"{self.name} has no scale. Download the checkpoint again.")

    @property
    def scales_are_fp16(self) -> bool:
        return self.scale.dtype == "F16"

    def read_into(self, out: Tensor) -> None:
        """Dequantize, in fp32, into `out`, of this shape and any float dtype."""
        from headrace.quantization.integers import dequantize

        assert tuple(out.shape) == self.shape
        out.copy_(dequantize(self.name, self.scheme, self.parts))

    def _check_scales(self) -> None:
        outputs, inputs = self.shape
        scheme, shape = self.scheme, self.scale.shape
        groups = 1 if scheme.group_size is None else -(-inputs // scheme.group_size)
        allowed: tuple[tuple[int, ...], ...] = ((outputs, groups),)
        if scheme.layout in ("gptq", "awq"):
            allowed = ((groups, outputs),)
        elif scheme.of_blocks:
            allowed = ((-(-outputs // BLOCK), -(-inputs // BLOCK)),)
        elif scheme.group_size is None:
            allowed = ((outputs, 1), (outputs,), (1,), ())
        if shape not in allowed:
            self._refuse(self.scale, f"of shape {list(allowed[0])}")
        values = 32 // scheme.bits
        for name, expected in (
            ("qzeros", (groups, -(-outputs // values))),
            ("weight_zero_point", (-(-outputs // values), groups)),
            ("g_idx", (inputs,)),
        ):
            part = self.parts.get(name)
            if part is not None and (part.shape != expected or part.dtype != "I32"):
                self._refuse(part, f"I32 of shape {list(expected)}")

    def _refuse(self, part: Part, wanted: str) -> NoReturn:
        raise CheckpointError(
            f"Tensor {part.name} is {part.dtype} of shape {list(part.shape)}, not {wanted}, as its "
            "quantization_config says. Config and weights do not belong together, or the file is "
            "corrupt: download both again."
        )


def joined(tensors: Iterable[T], scheme: Scheme) -> Iterator[T | QuantizedWeight]:
    """Every weight of the checkpoint: those of quantized layers joined, the others as they are.

    Raises CheckpointError for a layer that lacks one of its tensors, or has an unknown one.
    """
    modules: dict[str, dict[str, T]] = {}
    for tensor in tensors:
        module, _, name = tensor.name.rpartition(".")
        if name in CALIBRATED or (scheme.symmetric and name == "weight_zero_point"):
            continue
        if modules.setdefault(module, {}).setdefault(name, tensor) is not tensor:
            raise CheckpointError(f"The checkpoint has tensor {tensor.name} twice.")
    names = PARTS[scheme.layout]
    for module, found in modules.items():
        parts = {name: found[name] for name in names if name in found}
        is_quantized = names[0] in parts
        if scheme.layout == "rows":
            is_quantized = "weight_scale" in parts or "weight_scale_inv" in parts
        if is_quantized:
            needed = set(names) - OPTIONAL
            if scheme.layout == "gptq" and not scheme.ordered:
                needed.discard("g_idx")
            if not scheme.symmetric:
                needed |= {"weight_zero_point"} & set(names)
            if missing := sorted(needed - parts.keys()):
                raise CheckpointError(
                    f"Layer {module} lacks its {missing[0]}. Download the checkpoint again."
                )
            yield QuantizedWeight(module, parts, scheme)
        for name, tensor in found.items():
            if not (is_quantized and name in parts):
                yield tensor
