"""The integrity check of a block: XXH3-64 over its bytes. It finds corruption and mix-ups, not forgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import xxhash

DIGEST_BYTES = 8
Digest = Callable[[memoryview], bytes]


def block_digest(block: memoryview) -> bytes:
    """Eight bytes (big endian) for the contiguous bytes of `block`."""
    digest: bytes = xxhash.xxh3_64_digest(block)
    return digest


def no_digest(block: memoryview) -> bytes:
    """In place of `block_digest` on links that do without."""
    return bytes(DIGEST_BYTES)


def combined_digest(pieces: Iterable[tuple[int, int, bytes]]) -> bytes:
    """One digest for a block that came in pieces (first layer, number of layers, digest), in the order of layers."""
    parts = (first.to_bytes(4, "big") + count.to_bytes(4, "big") + digest for first, count, digest in sorted(pieces))
    return bytes(xxhash.xxh3_64_digest(b"".join(parts)))
