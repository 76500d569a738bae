"""How long answers have been of late, as counts that fade: what share of them is shorter than so many tokens."""

from __future__ import annotations

NUM_CLASSES = 24  # powers of two of tokens
KEEP = 0.998
PRIOR = 0.1  # of an answer in each class up to 1,024 tokens


class AnswerLengths:
    def __init__(self) -> None:
        self._counts = [PRIOR if 1 <= place <= 10 else 0.0 for place in range(NUM_CLASSES)]
        self._total = sum(self._counts)

    def add(self, num_tokens: int) -> None:
        place = min(max(1, num_tokens).bit_length(), NUM_CLASSES - 1)
        self._counts = [count * KEEP for count in self._counts]
        self._counts[place] += 1.0
        self._total = sum(self._counts)

    def share_below(self, num_tokens: float) -> float:
        """Of all answers, evenly spread within a class."""
        if num_tokens <= 1:
            return 0.0
        whole = int(num_tokens).bit_length()
        if whole >= NUM_CLASSES:
            return 1.0
        low = 1 << (whole - 1)
        below = sum(self._counts[:whole]) + self._counts[whole] * (num_tokens - low) / low
        return min(1.0, below / self._total)
