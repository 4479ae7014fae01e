"""AttentionMetadata: the shape of one step's ragged batch, made once and read by every layer.

It knows lengths, blocks and slots; it knows nothing of requests, weights or kernels.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each request's tokens lie in the flat batch and in the paged KV cache.

    T may exceed the sum of the query lengths: rows behind the last request are padding, belong to
    nobody and have slot -1. The device tensors and their host copies say the same; or the copies
    are of no requests: only the device knows, as in a CUDA graph, which is replayed with any.
    """

    query_start_loc: Tensor
    """[R + 1] int32: request r owns rows query_start_loc[r] to query_start_loc[r + 1].

    It may own none: it pads a batch of fewer requests then, and its length and blocks are not read.
    """
    seq_lens: Tensor
    """[R] int32: tokens in the cache once this step has written its own."""
    block_table: Tensor
    """[R, max_blocks] int32: physical block of each P tokens; past a length it is not read."""
    slot_mapping: Tensor
    """[T] int64: block * P + offset that each token's K and V go to; -1 for padding."""
    query_lens: npt.NDArray[np.int32]
    """[R] on the host."""
    kv_lens: npt.NDArray[np.int32]
    """[R] on the host: `seq_lens`."""
    host_block_table: npt.NDArray[np.int32]
    """[R, max_blocks] on the host."""
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel derives from the fields above at its first call, kept for the other layers."""

    @classmethod
    def build(
        cls,
        query_lens: npt.NDArray[Any],
        seq_lens: npt.NDArray[Any],
        block_table: npt.NDArray[Any],
        slot_mapping: npt.NDArray[Any],
        device: torch.device | str,
    ) -> AttentionMetadata:
        """Copy the scheduler's arrays to `device`; query_lens[r] <= seq_lens[r] unless it is 0."""
        query_lens = np.array(query_lens, dtype=np.int32)
        kv_lens = np.array(seq_lens, dtype=np.int32)
        host_block_table = np.array(block_table, dtype=np.int32)
        assert query_lens.shape == kv_lens.shape == host_block_table.shape[:1]
        assert ((query_lens == 0) | (query_lens > 0) & (query_lens <= kv_lens)).all()
        query_start_loc = np.zeros(len(query_lens) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=query_start_loc[1:])
        assert query_start_loc[-1] <= len(slot_mapping)
        return cls(
            query_start_loc=torch.from_numpy(query_start_loc).to(device),
            seq_lens=torch.from_numpy(kv_lens).to(device),
            block_table=torch.from_numpy(host_block_table).to(device),
            slot_mapping=torch.from_numpy(np.array(slot_mapping, dtype=np.int64)).to(device),
            query_lens=query_lens,
            kv_lens=kv_lens,
            host_block_table=host_block_table,
        )
