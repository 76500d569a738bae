"""Which tokens a head drafts: those that the target says most often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from .generation import Sample


def frequent_tokens(samples: Iterable[Sample], size: int, vocab_size: int, always: Iterable[int] = ()) -> torch.Tensor:
    """The `size` tokens that are most frequent in the answers, ascending, int64; lower ids first among equals.

    `always` are among them, as tokens that end an answer.
    """
    counts = Counter(token_id for sample in samples for token_id in sample.output_ids)
    wanted = set(always)
    order = sorted(range(vocab_size), key=lambda token_id: (token_id not in wanted, -counts[token_id], token_id))
    return torch.tensor(sorted(order[:size]))


def coverage(samples: Sequence[Sample], token_ids: torch.Tensor) -> float:
    """The share of the answers' tokens that are among `token_ids`."""
    drafted = set(token_ids.tolist())
    total = sum(len(sample.output_ids) for sample in samples)
    return sum(token_id in drafted for sample in samples for token_id in sample.output_ids) / max(total, 1)
