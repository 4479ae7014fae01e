"""What the layers of one model share: types, device, kernels and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace_kernels.cpu.pages import Arena
from headrace_kernels.kernel_set import KernelSet

SMALLEST_ROWS = 8


class LayerContext:
    """Where layers run, in what types, and by which kernels; given to each as it is made."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
        activation_bits: int = 8,
    ) -> None:
        self.dtype = dtype
        self.activation_bits = activation_bits
        """Of the inputs of packed products: 8, in groups with a scale, or 16, which are bf16."""
        self.device = device
        self.kernels = kernels
        self._activations: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._outgrown: list[Tensor] = []
        self._arena = Arena()

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter that is not initialized: it is read from a checkpoint."""
        return nn.Parameter(self._empty(*shape, dtype=dtype or self.dtype), requires_grad=False)

    def activations(
        self, name: str, rows: int, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[rows, *shape], uninitialized, by default in the dtype of the model.

        Memory of one name and shape is the same at every call, for all layers and steps: a forward
        pass allocates nothing, and a recorded one may be replayed. Memory that becomes too small
        is kept, since recordings may point to it; sizes double, so that is less than is in use.
        """
        key = (name, shape, dtype or self.dtype)
        memory = self._activations.get(key)
        if memory is None or len(memory) < rows:
            capacity = max(SMALLEST_ROWS, 1 << (rows - 1).bit_length())
            if memory is not None:
                self._outgrown.append(memory)
            memory = self._empty(capacity, *shape, dtype=key[2])
            self._activations[key] = memory
        return memory[:rows]

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return self._arena.empty(*shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)
