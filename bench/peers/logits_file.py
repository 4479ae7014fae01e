"""The file that `llama-perplexity --kl-divergence-base` writes: tokens and log-probabilities.

Layout (tools/perplexity of llama.cpp): "_logits_"; int32 context, vocabulary, chunks;
int32 tokens [chunks, context]; then for each chunk the positions from context // 2 to context - 2,
a row each: float32 scale and minimum, uint16 q [vocabulary, made even], log p = scale q + minimum.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = b"_logits_"


class LogitsFile:
    """tokens: [chunks, context] int32. Raises ValueError for a file of another layout."""

    def __init__(self, path: Path) -> None:
        data = np.memmap(path, np.uint8, mode="r")
        if data[: len(MAGIC)].tobytes() != MAGIC:
            raise ValueError(f"{path} is no file of log-probabilities of llama-perplexity")
        header = data[len(MAGIC) : len(MAGIC) + 12].view("<i4")
        self.context, self.vocabulary, self.chunks = (int(value) for value in header)
        begin = len(MAGIC) + 12
        end = begin + 4 * self.chunks * self.context
        self.tokens = data[begin:end].view("<i4").reshape(self.chunks, self.context)
        width = 2 * ((self.vocabulary + 1) // 2) + 4  # in uint16
        rows = self.chunks * (self.context - 1 - self.first)
        if len(data) != end + 2 * rows * width:
            raise ValueError(f"{path} has {len(data)} bytes, {end + 2 * rows * width} expected")
        self._rows = data[end:].view("<u2").reshape(self.chunks, -1, width)

    @property
    def first(self) -> int:
        """The first position of a chunk that counts; the last is context - 2."""
        return self.context // 2

    def log_probabilities(self, chunk: int) -> npt.NDArray[np.float32]:
        """[positions, vocabulary] of one chunk."""
        rows = np.asarray(self._rows[chunk])
        scale, minimum = np.split(np.ascontiguousarray(rows[:, :4]).view("<f4"), 2, axis=1)
        values: npt.NDArray[np.float32] = rows[:, 4 : 4 + self.vocabulary] * scale + minimum
        return values
