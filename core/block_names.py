"""What a cached block is called between processes: 8 bytes that say nothing of its tokens without the cluster's key.

name = blake2b(key = derived from the cluster's key; hash of the block), where the hash covers the tenant's salt, the
model, the layout and every token up to the block's end (`prefix_hash`). So each router can name the blocks of a prompt,
and no other tenant's blocks have the same names. Two blocks share a name with a chance of 2^-64 for each pair; then a
router guesses wrong once, and nothing else happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from .prefix_hash import BlockHash

NAME_BYTES = 8


def name_key(cluster_key: bytes) -> bytes:
    """The secret that names are made with."""
    return hashlib.blake2b(b"", key=cluster_key[:64], digest_size=32, person=b"penstock blocks").digest()


def block_name(key: bytes, block_hash: BlockHash) -> bytes:
    return hashlib.blake2b(block_hash, key=key, digest_size=NAME_BYTES).digest()


def block_names(key: bytes, hashes: Iterable[BlockHash]) -> list[int]:
    """The names as whole numbers, as `unpack_names` gives them."""
    return [int.from_bytes(block_name(key, block_hash), "little") for block_hash in hashes]


def unpack_names(data: bytes) -> list[int]:
    """Names out of a message; a torn one at the end is left out."""
    names: list[int] = np.frombuffer(data[: len(data) - len(data) % NAME_BYTES], dtype="<u8").tolist()
    return names
