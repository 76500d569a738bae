"""The random numbers of a draw in Triton: Philox4x32-10 for its key, two hash rounds for each token's arrival time.

The twins are `core.random_bits.philox4x32` and `reference.arrival_times`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed, index):
    """int64 seed and index → the four words of the draw, each a uint64 below 2^32."""
    seed = seed.to(tl.uint64, bitcast=True)
    index = index.to(tl.uint64, bitcast=True)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    c0, c1, c2, c3 = index & 0xFFFFFFFF, index >> 32, (seed & 0) + 1, seed & 0
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)


@triton.jit
def _mixed(words, before, between, FIRST: tl.constexpr, SECOND: tl.constexpr):
    words ^= before
    words ^= words >> 16
    words *= FIRST
    words ^= words >> 15
    words += between
    words *= SECOND
    words ^= words >> 16
    return words


@triton.jit
def arrival_times(token, w0, w1, w2, w3):
    """Exponential times of rate 1 of these tokens."""
    words = token.to(tl.uint32) * 0x9E3779B1
    words = _mixed(words, w0, w1, 0x85EBCA6B, 0xC2B2AE35)
    words = _mixed(words, w2, w3, 0x7FEB352D, 0x846CA68B)
    share = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # log1p(-share) by Kahan's quotient: the rounding of 1 - share cancels between the logarithm and the difference.
    rest = 1.0 - share
    difference = tl.where(rest == 1.0, -1.0, rest - 1.0)
    return tl.where(rest == 1.0, share, share * (tl.log(rest) / difference))
