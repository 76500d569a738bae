"""The integrity check of a block: XXH3-64 over its bytes. It finds corruption and mix-ups, not forgery."""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 8


def block_digest(block: memoryview) -> bytes:
    """Eight bytes (big endian) for the contiguous bytes of `block`."""
    digest: bytes = xxhash.xxh3_64_digest(block)
    return digest
