"""The identity of a cached block: a keyed 256-bit hash over its tokens and everything before them.

hash(block) = blake2b(key = H(salt, model, layout); parent hash, fixed-width token ids). Two requests share a block
only if salt, model, cache layout and every token up to the block's end agree. Keys never come from clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BlockHash = bytes  # 32 bytes


def hash_key(salt: str, model: str, layout: str) -> bytes:
    """The key of one cache namespace. The lengths go in, so ("a", "bc") and ("ab", "c") differ."""
    parts = b"".join(len(p.encode()).to_bytes(4, "little") + p.encode() for p in (salt, model, layout))
    return hashlib.blake2b(parts, digest_size=32).digest()


def extend_block_hashes(hashes: list[BlockHash], key: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `hashes` the hash of every full block of `token_ids` that it does not have yet."""
    num_full = len(token_ids) // block_size
    if len(hashes) >= num_full:
        return
    first = len(hashes) * block_size
    ids = np.asarray(token_ids[first : num_full * block_size], dtype="<i4").tobytes()
    parent = hashes[-1] if hashes else b""
    stride = 4 * block_size
    for offset in range(0, len(ids), stride):
        parent = hashlib.blake2b(parent + ids[offset : offset + stride], key=key, digest_size=32).digest()
        hashes.append(parent)


def block_hashes(key: bytes, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """One hash for each full block of `token_ids`."""
    hashes: list[BlockHash] = []
    extend_block_hashes(hashes, key, token_ids, block_size)
    return hashes
