"""Where a prompt is cut for the router's prefix index: at every block near its head, in larger steps further on.

A prompt of 100,000 tokens has 6,250 blocks of 16; hashing each costs more than placing the request. The index is a
guess anyway, so it need not know the last few per cent of a long match. Steps are multiples of the block size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .rung_hash import RungHash, extend_sums

FINE_TOKENS = 1024  # up to here, each block
MIDDLE_TOKENS = 8192  # up to here, steps of at least MIDDLE_STEP tokens, and beyond it of at least COARSE_STEP
MIDDLE_STEP = 64
COARSE_STEP = 512


@lru_cache(maxsize=64)
def _regions(block_size: int) -> tuple[tuple[int, int, int], ...]:
    """(first rung, tokens before it, step) of each region."""
    regions, rung, start = [], 0, 0
    for stop, least in ((FINE_TOKENS, 1), (MIDDLE_TOKENS, MIDDLE_STEP), (0, COARSE_STEP)):
        step = -(-least // block_size) * block_size
        regions.append((rung, start, step))
        count = max(0, (stop - start) // step)
        rung, start = rung + count, start + count * step
    return tuple(regions)


def covered_tokens(num_rungs: int, block_size: int) -> int:
    """Tokens that so many leading rungs cover."""
    fine, middle, coarse = _regions(block_size)
    first, start, step = coarse if num_rungs >= coarse[0] else middle if num_rungs >= middle[0] else fine
    return start + (num_rungs - first) * step


def num_full_rungs(num_tokens: int, block_size: int) -> int:
    """Rungs that lie wholly within so many tokens."""
    fine, middle, coarse = _regions(block_size)
    first, start, step = coarse if num_tokens >= coarse[1] else middle if num_tokens >= middle[1] else fine
    return first + (num_tokens - start) // step


def extend_rung_hashes(hashes: list[RungHash], key: bytes, ids: bytes, block_size: int) -> None:
    """Append the hash of every full rung of `ids` (packed, four bytes a token) that `hashes` does not have yet.

    Each stands for its own tokens and all before them.
    """
    num_rungs = num_full_rungs(len(ids) // 4, block_size)
    extend_sums(hashes, key, ids, _stops(block_size, 1 << num_rungs.bit_length())[:num_rungs])


@lru_cache(maxsize=256)
def _stops(block_size: int, count: int) -> npt.NDArray[np.int64]:
    """Where each rung ends, in bytes."""
    return np.array([4 * covered_tokens(rung, block_size) for rung in range(1, count + 1)], np.int64)


def rung_sizes(num_rungs: int, block_size: int) -> list[int]:
    """Tokens of each of at least so many rungs."""
    sizes = _sizes(block_size)
    while len(sizes) < num_rungs:
        sizes.append(covered_tokens(len(sizes) + 1, block_size) - covered_tokens(len(sizes), block_size))
    return sizes


@lru_cache(maxsize=64)
def _sizes(block_size: int) -> list[int]:
    """A list that grows in place as longer prompts come."""
    return []
