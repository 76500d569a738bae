"""Which of a sequence's new tokens a new token sees, when they form a tree of guesses and not a chain.

One int64 for each row of q: bit j says that the row sees the j-th new token of its sequence. A row sees itself and
its ancestors, which come before it; bits behind the row itself are not read, so `CAUSAL` is a plain chain. All
earlier tokens of the sequence are seen. A sliding window counts a row's ancestors, not the slots between.

Only sequences with at most `plan.SHORT_QUERY` new tokens may be trees; in longer ones the numbers are not read.
"""

from __future__ import annotations

from itertools import pairwise

import torch

CAUSAL = -1


def pack_tree(mask: torch.Tensor) -> torch.Tensor:
    """int64 [num_tokens] from mask, bool [num_tokens, max_query_len]: whether a row sees the j-th new token."""
    places = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
    return (mask.to(torch.int64) << places).sum(dim=1)


def unpack_tree(tree: torch.Tensor, cu_seqlens_q: list[int]) -> torch.Tensor:
    """bool [num_tokens, max_query_len]: the inverse of `pack_tree` for rows of these sequences, later bits cleared."""
    rows = tree.tolist()
    lengths = [stop - start for start, stop in pairwise(cu_seqlens_q)]
    mask = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.bool)
    for start, length in zip(cu_seqlens_q[:-1], lengths, strict=True):
        for index in range(length):
            for other in range(index + 1):
                mask[start + index, other] = bool(rows[start + index] >> other & 1)
    return mask
