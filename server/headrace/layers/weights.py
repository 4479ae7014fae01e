"""WeightTensor: what layers ask of a tensor in a checkpoint. Nothing here knows file formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from torch import Tensor

from headrace.errors import CheckpointError


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


WeightSlots = dict[str, Tensor]
"""Hugging Face name -> the parameter, or the slice of a fused one, that the tensor is read into."""


def read_weights(
    tensors: Iterable[WeightTensor],
    slots: WeightSlots,
    *,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> set[str]:
    """Fill every slot from the tensor of its name; those of `optional` names may stay unfilled.

    Returns the names that were read. Raises CheckpointError, naming the tensor, for one that is
    missing, there twice, of a wrong shape, or unexpected and not in `ignored`.
    """
    done: set[str] = set()
    for tensor in tensors:
        slot = slots.get(tensor.name)
        if slot is None:
            if tensor.name in ignored:
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
        tensor.read_into(slot)
        done.add(tensor.name)
    if missing := sorted(slots.keys() - done - set(optional)):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of its architecture's tensors: {names}. "
            "Download it again, or check that all of its shards are there."
        )
    return done
