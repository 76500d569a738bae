"""What a draft head is trained for: the target's own distribution of the next token, in each step of the unrolling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..models.draft_head import DraftHead
from .batches import Batch
from .unroll import unroll

_LATER_STEPS = 0.8  # the weight of a step, for each one before it: guesses that are rarely reached count less


class Teacher:
    """The target's distribution over the draft vocabulary. lm_head [draft_vocab_size, hidden_size]: its rows."""

    def __init__(self, lm_head: torch.Tensor, draft_ids: torch.Tensor, vocab_size: int) -> None:
        self.lm_head = lm_head
        self.is_drafted = torch.zeros(vocab_size, dtype=torch.bool, device=draft_ids.device)
        self.is_drafted[draft_ids] = True

    @torch.no_grad()
    def probabilities(self, final: torch.Tensor) -> torch.Tensor:
        """[..., draft_vocab_size] float32, of hidden states that the target's head multiplies."""
        return F.linear(final, self.lm_head).float().softmax(dim=-1)


def unrolled_loss(head: DraftHead, teacher: Teacher, batch: Batch, num_steps: int) -> torch.Tensor:
    """Cross-entropy to the target's distribution, mean over the rows that count and weighted over the steps.

    Rows whose token cannot be drafted do not count.
    """
    counts = batch.is_answer & teacher.is_drafted[batch.next_ids]
    wanted = teacher.probabilities(batch.final[counts])
    start = batch.is_answer.int().argmax(dim=1, keepdim=True)  # each sequence's first row that counts
    age = torch.arange(counts.shape[1], device=counts.device) - start
    total, weights = torch.zeros((), device=counts.device), 0.0
    for step, hidden in enumerate(unroll(head, batch.rows, num_steps)):
        reached = (age >= step)[counts]
        if not bool(reached.any()):
            break
        logits = head.logits(hidden[counts][reached]).float()
        weight = _LATER_STEPS**step
        total = total + weight * F.cross_entropy(logits, wanted[reached])
        weights += weight
    return total / max(weights, 1.0)
