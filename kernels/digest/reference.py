"""The truth for digests: the xxhash library, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

DIGEST_BYTES = 8
Place = tuple[int, int]  # offset and number of bytes


def block_digest(block: memoryview | bytes) -> bytes:
    """XXH3-64 of contiguous bytes, eight of them, big endian (the canonical form)."""
    digest: bytes = xxhash.xxh3_64_digest(block)
    return digest


def digests(region: memoryview, places: Sequence[Place]) -> bytes:
    """As `op.digests`."""
    return b"".join(block_digest(region[offset : offset + nbytes]) for offset, nbytes in places)


def numbers(data: bytes, starts: Sequence[int], sizes: Sequence[int]) -> npt.NDArray[np.uint64]:
    """As `op.digests_at`."""
    view = memoryview(data)
    found = [xxhash.xxh3_64_intdigest(view[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    return np.array(found, np.uint64)


def copied(source: memoryview, places: Sequence[Place], target: memoryview, to: Sequence[Place]) -> bytes:
    """As `op.copied`."""
    for (start, nbytes), (stop, _) in zip(places, to, strict=True):
        target[stop : stop + nbytes] = source[start : start + nbytes]
    return digests(target, to)
