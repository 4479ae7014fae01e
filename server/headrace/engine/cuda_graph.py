"""Which CUDA graphs there are, which a step takes, and which is captured next. Pure bookkeeping.

Graphs are keyed by their number of tokens, padding included, and by nothing else: attention reads
its work from device memory, so that one graph serves any mix of prefill and decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headrace.engine.cuda_device import Graph

MAX_GRAPH_TOKENS = 512
"""Steps of more take long enough to hide what launching them op by op costs."""
CHEAP_TOKENS = 64
"""Up to so many, a step takes as long as reading the weights, whatever its size."""
MISSES_BEFORE_CAPTURE = 8
"""So often a size is missed before it is captured between steps, which costs about two of them."""
POOL_SPARE_BLOCKS = (*(1 << 20,) * 16, 20 << 20)
"""Bytes of blocks that the pool gets beside what the first graph, the largest, takes. Torch's
allocator keeps requests of up to 1 MiB apart, and there the largest graph may have none: a smaller
one's tensors find theirs here, so that no later graph makes the pool grow."""
POOL_SLACK_BYTES = 32 << 20
"""More growth behind the first graph ends capturing. Any at all fails bench/gpu.py."""


def graph_sizes(max_tokens: int, multiple: int) -> tuple[int, ...]:
    """Ascending numbers of tokens to capture, each a multiple of `multiple`, the last at least
    max_tokens or MAX_GRAPH_TOKENS. Beyond CHEAP_TOKENS at most a quarter of a graph is padding."""
    largest = -(-min(max_tokens, MAX_GRAPH_TOKENS) // multiple) * multiple
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_GRAPH_TOKENS + 1, 32))
    return (*(size for size in steps if size % multiple == 0 and size < largest), largest)


class GraphBook:
    """The graphs of one runner, by size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        self.pool_growth = 0
        """Bytes that the pool grew by behind the first capture."""
        self._graphs: dict[int, Graph] = {}
        self._missed: Counter[int] = Counter()
        self._closed = False

    def __getitem__(self, size: int) -> Graph:
        return self._graphs[size]

    @property
    def captured(self) -> list[int]:
        return sorted(self._graphs)

    @property
    def is_closed(self) -> bool:
        """Whether no more graphs are captured."""
        return self._closed or self.pool_growth > POOL_SLACK_BYTES

    def close(self) -> None:
        self._closed = True

    def take(self, num_tokens: int) -> int | None:
        """The captured size that a step of so many tokens runs in; None: op by op.

        If its own size is not captured, the next one is taken unless it wastes much; the miss is
        counted, for `due`.
        """
        own = next((size for size in self.sizes if size >= num_tokens), None)
        if own is None or own in self._graphs:
            return own
        self._missed[own] += 1
        limit = max(CHEAP_TOKENS, 2 * own)
        return next((size for size in self.captured if own < size <= limit), None)

    def due(self) -> int | None:
        """A size that was missed so often that it is captured even between steps."""
        for size, misses in self._missed.most_common(1):
            if misses >= MISSES_BEFORE_CAPTURE and not self.is_closed:
                return size
        return None

    def next(self) -> int | None:
        """What to capture in idle time: the largest first, since its memory holds the others;
        then what was missed most, then the rest from large to small."""
        left = [size for size in self.sizes if size not in self._graphs]
        if not left or self.is_closed:
            return None
        if not self._graphs:
            return left[-1]
        return max(left, key=lambda size: (self._missed[size], size))

    def add(self, size: int, graph: Graph, pool_growth: int) -> None:
        """`pool_growth`: bytes that the process reserved while it captured."""
        assert size in self.sizes and size not in self._graphs
        if self._graphs:
            self.pool_growth += pool_growth
        self._graphs[size] = graph
        del self._missed[size]
