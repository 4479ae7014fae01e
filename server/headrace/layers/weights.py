"""WeightTensor: what layers ask of a tensor in a checkpoint. Nothing here knows file formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.quantization.method import QuantMethod


class WeightTensor(Protocol):
    """One tensor of a checkpoint, still on disk."""

    @property
    def name(self) -> str:
        """Its Hugging Face name, such as model.layers.0.self_attn.q_proj.weight."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, out: Tensor) -> None:
        """Convert into `out`, which has this shape and may be a slice of a fused parameter."""
        ...


class WeightSlot(Protocol):
    """A place for a tensor that may be kept in the form in which it is stored."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, tensor: WeightTensor, method: QuantMethod | None) -> None:
        """`method` keeps what it can as it is; the rest, or all without one, becomes dense."""
        ...


WeightSlots = dict[str, Tensor | WeightSlot]
"""Hugging Face name -> the parameter, or the part of a fused one, that the tensor is read into."""


def read_weights(
    tensors: Iterable[WeightTensor],
    slots: WeightSlots,
    *,
    method: QuantMethod | None = None,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> set[str]:
    """Fill every slot from the tensor of its name; those of `optional` names may stay unfilled.

    `method` says which tensors are kept in 4 or 8 bits; without one all become dense. A bias of
    zeros that the architecture does not have is left out: AutoGPTQ stores them.

    Returns the names that were read. Raises CheckpointError, naming the tensor, for one that is
    missing, there twice, of a wrong shape, or unexpected and not in `ignored`.
    """
    done: set[str] = set()
    for tensor in tensors:
        slot = slots.get(tensor.name)
        if slot is None:
            if tensor.name in ignored or _is_bias_of_zeros(tensor):
                continue
            raise CheckpointError(
                f"The checkpoint has a tensor that its architecture does not know: {tensor.name}. "
                "Check that the config belongs to these weights."
            )
        if tensor.name in done:
            raise CheckpointError(f"The checkpoint has tensor {tensor.name} twice.")
        if tuple(tensor.shape) != tuple(slot.shape):
            raise CheckpointError(
                f"Tensor {tensor.name} has shape {tuple(tensor.shape)}, but the config asks for "
                f"{tuple(slot.shape)}. Check that the config belongs to these weights."
            )
        if isinstance(slot, Tensor):
            tensor.read_into(slot)
        else:
            slot.read(tensor, method)
        done.add(tensor.name)
    if missing := sorted(slots.keys() - done - set(optional)):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of its architecture's tensors: {names}. "
            "Download it again, or check that all of its shards are there."
        )
    return done


def _is_bias_of_zeros(tensor: WeightTensor) -> bool:
    if not tensor.name.endswith(".bias") or len(tensor.shape) != 1:
        return False
    bias = torch.empty(tensor.shape)
    tensor.read_into(bias)
    return not bool(bias.any())
