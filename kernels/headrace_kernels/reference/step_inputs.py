"""A step's inputs in plain torch: no shape depends on data, so nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def put(index: Tensor, values: Tensor, out: Tensor) -> None:
    """See ops/step_inputs.py."""
    out.index_copy_(0, index.long(), values.to(out.dtype))


def token_inputs(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tokens: Tensor,
    last_tokens: Tensor,
    block_table: Tensor,
    page_size: int,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See ops/step_inputs.py."""
    index = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
    is_padding = index >= query_start_loc[-1]
    row = torch.searchsorted(query_start_loc[1:].contiguous(), index, right=True)
    row.masked_fill_(is_padding, 0)
    position = (seq_lens[row] - query_start_loc[row + 1] + index).long()
    position.masked_fill_(is_padding, 0)
    token = torch.where(tokens < 0, last_tokens[row], tokens).clamp(min=0)
    token_ids.copy_(token.masked_fill(is_padding, 0))
    positions.copy_(position)
    blocks = block_table[row, position // page_size].long()
    slot_mapping.copy_((blocks * page_size + position % page_size).masked_fill(is_padding, -1))


def sampling_inputs(
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    words: Tensor,
    logit_indices: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> None:
    """See ops/step_inputs.py."""
    row = rows.long()
    logit_indices.copy_(query_start_loc[row + 1] - 1)
    positions.copy_(seq_lens[row])
    own = words[row]
    temperature.copy_(own[:, 0].contiguous().view(torch.float32))
    top_k.copy_(own[:, 1])
    top_p.copy_(own[:, 2].contiguous().view(torch.float32))
    min_p.copy_(own[:, 3].contiguous().view(torch.float32))
    seeds.copy_((own[:, 5].long() << 32) | (own[:, 4].long() & 0xFFFFFFFF))
