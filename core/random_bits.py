"""Counter-based random numbers: the draw for a token depends on (seed, token index) and on nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The same on every device and in
every process, so a stream that moves to another worker goes on with the same draws.
"""

from __future__ import annotations

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox on four 32-bit counter words with a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int, stream: int = 0) -> float:
    """A float in [0, 1) with 53 random bits for token `index` of a sequence seeded with `seed` (64-bit)."""
    a, b, _, _ = philox4x32((index & _MASK, index >> 32 & _MASK, stream & _MASK, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((a << 21) ^ (b >> 11)) / (1 << 53)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice number `choice` of a request with `n` choices. Choice 0 keeps the request's seed."""
    if choice == 0:
        return seed
    a, b, _, _ = philox4x32((choice & _MASK, 0, 0, 1), (seed & _MASK, seed >> 32 & _MASK))
    return (a << 32 | b) & 0x7FFFFFFFFFFFFFFF
