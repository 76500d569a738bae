"""Drafting step by step: a chain of guesses behind a sequence's last tokens, over the head's own keys and values.

One round of a sequence, once the target has computed tokens up to p and drawn token p + 1:

1. rows of which the target's features are new are stored for good: row t is (features of token t, token t + 1);
2. the last of them, row p, guesses token p + 2;
3. each further guess is a row made of the layer's own output and the guess before, which is forgotten afterwards.

`DraftCache` is the plain, contiguous cache that others are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .draft_head import DraftHead


class DraftCache:
    """Keys and values of one sequence's rows [0, num_rows), which it has features of; room for `capacity` rows.

    The first row may stand at any position: what lies before it is not seen.
    """

    def __init__(
        self, head: DraftHead, capacity: int, first_position: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        layer = head.config.layer
        shape = (capacity, layer.num_kv_heads, layer.head_dim)
        kind = dtype or head.lm_head.dtype
        self.keys, self.values = (torch.zeros(shape, dtype=kind, device=head.lm_head.device) for _ in range(2))
        self.num_rows, self.first_position = 0, first_position


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """token_ids: the guesses, the target's ids. logits [len(token_ids), draft_vocab_size]: what each was the likeliest
    of.
    """

    token_ids: list[int]
    logits: torch.Tensor


@torch.inference_mode()
def draft_chain(
    head: DraftHead, cache: DraftCache, features: torch.Tensor, token_ids: torch.Tensor, count: int
) -> Chain:
    """Store the rows behind those of `cache` and guess the `count` tokens that follow them, likeliest first choice.

    features [n, feature_size] of n ≥ 1 tokens; token_ids [n] int64: the token behind each of them. The first guess is
    the token behind token_ids[-1]. The cache must have room for n + count - 1 more rows; it keeps n.
    """
    hidden = _advance(head, cache, cache.num_rows, head.fuse(features), token_ids)
    cache.num_rows += len(token_ids)
    logits, guesses = [head.logits(hidden[-1])], [0] * count
    for number in range(count):
        guess = head.draft_ids[logits[-1].argmax()]
        guesses[number] = int(guess)
        if number + 1 < count:
            hidden = _advance(head, cache, cache.num_rows + number, hidden[-1:], guess.view(1))
            logits.append(head.logits(hidden[-1]))
    return Chain(guesses, torch.stack(logits))


def _advance(
    head: DraftHead, cache: DraftCache, start: int, hidden: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Rows [start, start + n) written into the cache; the layer's output for them, [n, hidden_size]."""
    stop = start + len(token_ids)
    index = torch.arange(start, stop, device=hidden.device)
    row = head.enter(hidden, token_ids, index + cache.first_position)
    cache.keys[start:stop], cache.values[start:stop] = row.k.to(cache.keys.dtype), row.v.to(cache.values.dtype)
    is_seen = torch.arange(stop, device=hidden.device) <= index.unsqueeze(1)
    q, k, v = (x.transpose(0, 1).to(hidden.dtype) for x in (row.q, cache.keys[:stop], cache.values[:stop]))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=head.scale, enable_gqa=True)
    return head.leave(row.residual, attended.transpose(0, 1))
