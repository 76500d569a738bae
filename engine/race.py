"""Drawing a token by a race: token t arrives after an exponential time divided by its weight, and the first one wins.

The winner is t with probability weight / total (Efraimidis & Spirakis, IPL 2006; the Gumbel-max trick in other words).
Each token's time depends on (seed, index, t) alone, so a change in the last bits of some weights, as another batch
shape or another worker brings it, changes the winner only where two tokens arrive together. A draw that inverts the
cumulative distribution has a boundary for every token instead, and among thousands of unlikely tokens any change moves
the number across one of them: a stream that goes on elsewhere would not go on the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..core.random_bits import philox4x32

Key = tuple[int, int, int, int]
Words = npt.NDArray[np.uint32]

_MASK = 0xFFFFFFFF
_ROUNDS = ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B))  # multipliers of murmur3's and lowbias32's finalizers
_SPREAD = np.uint32(0x9E3779B1)
_LARGEST = np.float32(1 - 2**-24)  # the largest float32 below 1


def race_key(seed: int, index: int) -> Key:
    """What makes the times of one draw: `seed` (64-bit) of the choice, `index` of the token."""
    return philox4x32((index & _MASK, index >> 32 & _MASK, 1, 0), (seed & _MASK, seed >> 32 & _MASK))


@lru_cache(maxsize=4)
def _spread_ids(vocab_size: int) -> Words:
    return np.arange(vocab_size, dtype=np.uint32) * _SPREAD


def arrival_times(key: Key, vocab_size: int, token_ids: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
    """Exponential times of rate 1, of every token or of `token_ids`. None is 0 or infinite."""
    spread = _spread_ids(vocab_size)
    words = spread.copy() if token_ids is None else spread[token_ids]
    for (first, second), (before, between) in zip(_ROUNDS, (key[:2], key[2:]), strict=True):
        words ^= np.uint32(before)
        words ^= words >> np.uint32(16)
        words *= np.uint32(first)
        words ^= words >> np.uint32(15)
        words += np.uint32(between)
        words *= np.uint32(second)
        words ^= words >> np.uint32(16)
    share = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    # Small times decide among unlikely tokens: log1p keeps their precision, where log(1 - share) would round it away.
    times: npt.NDArray[np.float32] = -np.log1p(-np.minimum(share, _LARGEST))
    return times


def winner(weights: npt.NDArray[np.float32], key: Key) -> int:
    """The token drawn with these unnormalised probabilities, [vocab_size], of which at least one is above 0."""
    kept = np.flatnonzero(weights)
    if 2 * len(kept) > len(weights):
        return int((weights / arrival_times(key, len(weights))).argmax())
    return int(kept[(weights[kept] / arrival_times(key, len(weights), kept)).argmax()])
