"""The hashes of a prompt's rungs in one pass: quick, keyed, and good for the router's guess only.

    hash of rung i = Σ over rungs j ≤ i of  digest of rung j · multiplier j      modulo 2^64

The digests are XXH3-64, many in one native call (`kernels/digest`); the multipliers are odd and drawn from a secret key
of the router, salt included. So a prefix has one hash, whatever follows it, and a sum is extended by what comes later.
Two prompts that differ have equal hashes by chance only: some 2^-58. Nobody outside sees a hash, and an equal one costs
a wrong guess, never a byte of another's cache: what a worker reuses goes by its own 256-bit hashes
(`core.prefix_hash`).
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import shake_256

import numpy as np
import numpy.typing as npt

from ..kernels.digest.op import digests_at
from ..kernels.digest.reference import block_digest

RungHash = int  # below 2^64
LEAST_BYTES = 256  # that a digest covers where there are so many: the kernel takes no less
_BIG_ENDIAN = np.dtype(">u8")


def extend_sums(hashes: list[RungHash], key: bytes, ids: bytes, stops: npt.NDArray[np.int64]) -> None:
    """Append the hash of every rung that `hashes` does not have yet. `stops`: where each ends, in bytes of `ids`."""
    first = len(hashes)
    if first >= len(stops):
        return
    starts = np.minimum(_starts(stops), np.maximum(stops - LEAST_BYTES, 0))[first:]
    found = _digests(ids, starts, stops[first:])
    products = found * _multipliers(key, _power_of_two(len(stops)))[first : len(stops)]
    if hashes:
        products[:1] += np.uint64(hashes[-1])  # an array, which wraps around in silence
    hashes += np.cumsum(products, dtype=np.uint64).tolist()


def _starts(stops: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate((np.zeros(1, np.int64), stops[:-1]))


def _digests(ids: bytes, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    num_short = int(np.searchsorted(stops, LEAST_BYTES))
    long = digests_at(ids, starts[num_short:], stops[num_short:] - starts[num_short:])
    if not num_short:
        return long
    short = b"".join(block_digest(ids[start:stop]) for start, stop in zip(starts, stops[:num_short], strict=False))
    return np.concatenate((np.frombuffer(short, _BIG_ENDIAN).astype(np.uint64), long))


@lru_cache(maxsize=256)
def _multipliers(key: bytes, count: int) -> npt.NDArray[np.uint64]:
    """The same ones, and more of them, for a larger count."""
    return np.frombuffer(shake_256(key).digest(8 * count), np.uint64) | np.uint64(1)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
