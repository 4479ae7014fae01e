"""Which blocks hold which request's KV: allocation, prefix caching by content, invariants.

Works on the block-table columns of `RunningRequests`; the tensors themselves live in the runner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.engine.block_pool import BlockPool
from headrace.engine.request import IntArray, Request, RunningRequests

HASH_VERSION = b"headrace-block-1"


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """The blocks a request was just given, in sequence order."""

    shared: tuple[int, ...]
    """Found by content in the prefix cache."""
    new: tuple[int, ...]


class KVCacheManager:
    """Hands out blocks of `block_size` tokens and finds those that hold a known prefix.

    A block's key is a chained 128-bit keyed blake2b over its parent's key and its token ids; the
    chain starts from salt, adapter, KV dtype and block size. With one `key` for an application its
    replicas agree on hashes, and nobody without it can forge a collision.
    """

    def __init__(
        self,
        pool: BlockPool,
        running: RunningRequests,
        *,
        block_size: int,
        key: bytes,
        kv_dtype: str,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.query_tokens = 0
        self.hit_tokens = 0
        self._running = running
        self._key = key
        self._kv_dtype = kv_dtype
        self._enabled = enable_prefix_caching

    @property
    def num_used_blocks(self) -> int:
        return self.pool.num_blocks - self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Cached blocks that hold the head of a waiting request. Takes no reference.

        Leaves at least the last token out: it must be computed to have logits. A request that
        wants log-probabilities of its prompt skips the cache, since hits compute none.
        """
        if not self._enabled or request.wants_prompt_logprobs:
            return []
        num_usable = (len(request.token_ids) - 1) // self.block_size
        self._extend_hashes(request, request.token_ids, num_usable)
        blocks = []
        for block_hash in request.block_hashes[:num_usable]:
            block = self.pool.lookup(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(
        self, row: int, num_tokens: int, *, shared: Sequence[int] = (), reserve: int = 0
    ) -> KVBlocks | None:
        """Let `row` hold `num_tokens` tokens; `shared` are the blocks of a prefix hit.

        None, and no change, if that would leave fewer than `reserve` blocks free: no room.
        """
        running = self._running
        held = int(running.num_blocks[row])
        missing = self.blocks_for(num_tokens) - held - len(shared)
        unused_hits = sum(1 for block in shared if self.pool.ref_count[block] == 0)
        if missing + unused_hits + reserve > self.pool.num_free:
            return None
        self.pool.share(shared)
        new = self.pool.take(missing)
        assert new is not None, "take failed after room was checked"
        end = held + len(shared) + missing
        running.block_table[row, held:end] = [*shared, *new]
        running.num_blocks[row] = end
        return KVBlocks(shared=tuple(shared), new=tuple(new))

    def free(self, row: int) -> None:
        """Drop the row's references; what is hashed stays findable until evicted."""
        blocks = self._running.block_table[row, : self._running.num_blocks[row]].tolist()
        self.pool.release(blocks)
        self._running.num_blocks[row] = 0

    def commit(self, row: int, num_computed_before: int, num_computed_after: int) -> None:
        """Make the blocks that the last step filled up findable by their contents."""
        first, end = num_computed_before // self.block_size, num_computed_after // self.block_size
        if not self._enabled or first == end:
            return
        request = self._running.request(row)
        self._extend_hashes(request, self._running.token_ids[row], end)
        for index in range(first, end):
            self.pool.register(
                int(self._running.block_table[row, index]), request.block_hashes[index]
            )

    def count_lookup(self, num_tokens: int, num_hit_tokens: int) -> None:
        if self._enabled:
            self.query_tokens += num_tokens
            self.hit_tokens += num_hit_tokens

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Requests that run keep their blocks."""
        self.pool.forget_all()

    def _extend_hashes(self, request: Request, token_ids: IntArray, num_blocks: int) -> None:
        hashes = request.block_hashes
        if not hashes and num_blocks > 0:
            parent = self._root_hash(request)
        for index in range(len(hashes), num_blocks):
            if index:
                parent = hashes[index - 1]
            tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
            hashes.append(self._hash(parent + tokens.astype("<i4", copy=False).tobytes()))

    def _root_hash(self, request: Request) -> bytes:
        source = request.source
        facts = (source.cache_salt, source.adapter, self._kv_dtype, str(self.block_size))
        # Lengths first, so that no two lists of facts can spell the same bytes.
        text = "".join(f"{len(fact)}:{fact}" for fact in facts)
        return self._hash(HASH_VERSION + text.encode())

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16, key=self._key).digest()

    def check_invariants(self) -> None:
        """Every reference is accounted for by a row's block table; raises AssertionError."""
        self.pool.check_invariants()
        running = self._running
        expected = np.zeros(self.pool.num_blocks, np.int64)
        for row in running.rows().tolist():
            blocks = running.block_table[row, : running.num_blocks[row]]
            assert len(set(blocks.tolist())) == len(blocks), f"row {row} lists a block twice"
            room = len(blocks) * self.block_size
            assert running.num_computed_tokens[row] <= room, f"row {row} outgrew its blocks"
            np.add.at(expected, blocks, 1)
        leaked = np.flatnonzero(expected != self.pool.ref_count)
        assert leaked.size == 0, f"reference counts are wrong for blocks {leaked.tolist()}"
