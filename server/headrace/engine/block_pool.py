"""Blocks of KV memory as numbers: reference counts, a free list in eviction order, content hashes.

Knows nothing of requests or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class BlockPool:
    """`num_blocks` blocks, each free (reference count 0) or shared by that many holders.

    A free block keeps its contents, and stays findable by its hash, until it is taken again:
    the free list is the prefix cache's eviction order, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_count = np.zeros(num_blocks, np.int32)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with a reference each, or None (and no change) if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_count[block] = 1
            self._forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference on each block, which may be free (a cache hit) until now."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self._free[block]
            self.ref_count[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each. `blocks` are in sequence order: the tail of a sequence is
        evicted before its head, because a prefix is useful without its tail only."""
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with these contents, or None. Takes no reference."""
        return self._block_of.get(block_hash)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a block that was written in full findable. The first one with a hash keeps it:
        block tables are append-only, so a duplicate stays where it is, unregistered."""
        assert self.ref_count[block] > 0, f"block {block} is free and cannot be registered"
        if block_hash not in self._block_of:
            self._forget(block)
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_all(self) -> None:
        """Drop every hash; contents in use stay with their holders. What was written before is
        taken again first: memory that nobody has touched yet costs more to write."""
        for block in self._hash_of:
            if self.ref_count[block] == 0:
                self._free.move_to_end(block, last=False)
        self._hash_of.clear()
        self._block_of.clear()

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def check_invariants(self) -> None:
        free = set(self._free)
        unreferenced = set(np.flatnonzero(self.ref_count == 0).tolist())
        assert free == unreferenced, f"free list and counts differ in {free ^ unreferenced}"
        assert (self.ref_count >= 0).all(), "a reference count is negative"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash maps disagree"
