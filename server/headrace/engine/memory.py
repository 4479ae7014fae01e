"""How the memory of a GPU is shared out: weights, then what steps need, then the KV cache. Pure.

Before a model is loaded these are estimates; then the largest step is run and its graph captured,
and they are what that took.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GPU_MEMORY_SHARE = 0.90
"""Of all memory of a GPU; the rest is for what is never planned, such as fragments."""
GRAPH_BYTES_ESTIMATE = 256 << 20
LOGITS_ROWS = 256
"""As model_runner.LOGITS_CHUNK."""
LOGITS_COPIES = 3
"""The logits of a chunk, adjusted ones, and what a sampler needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """In bytes."""

    total: int
    """Of the device."""
    others: int
    """In use before the model is loaded, by other processes and by CUDA itself."""
    weights: int
    activations: int
    """Of a step at the token budget, with a chunk of logits and the sampler."""
    graphs: int
    is_measured: bool = False

    @property
    def kv_cache(self) -> int:
        """What is left; it may be negative."""
        return int(self.total * GPU_MEMORY_SHARE) - (self.total - self.free)

    @property
    def free(self) -> int:
        """What nobody holds once all but the KV cache is there."""
        return self.total - self.others - self.weights - self.activations - self.graphs

    def lines(self) -> Iterator[tuple[str, int, str]]:
        """(name, bytes, where it comes from), as `headrace plan` shows them."""
        source = "measured" if self.is_measured else "estimate; measured when the model is loaded"
        yield "GPU memory", self.total, f"{GPU_MEMORY_SHARE:.0%} of it are shared out"
        yield "in use", self.others, "by other processes and CUDA, now"
        yield "activations", self.activations, source
        yield "graphs", self.graphs, source


def estimated_activations(
    *, max_tokens: int, bytes_per_token: int, max_num_seqs: int, vocab_size: int
) -> int:
    """Bytes of a step of so many tokens; memory of layers comes in powers of two of them."""
    tokens = 1 << (max_tokens - 1).bit_length()
    logits = min(LOGITS_ROWS, max_num_seqs) * vocab_size * 4 * LOGITS_COPIES
    return tokens * bytes_per_token + logits
