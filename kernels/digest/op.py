"""The integrity check of blocks: XXH3-64 over their bytes. It finds corruption and mix-ups, not forgery.

The native kernel digests many blocks in one call, without the interpreter's lock; on the way of a copy, the digest
costs next to nothing, because a copy waits for memory. Reference: `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from ...core.errors import InternalError
from ..native.library import ADDRESS, INT64, Function, function
from . import reference
from .reference import Place

_SHORTEST = 241  # XXH3 hashes shorter inputs in other ways
_BIG_ENDIAN = np.dtype(">u8")
Places = npt.NDArray[np.int64]


def digests(region: memoryview, places: Sequence[Place]) -> bytes:
    """The digests of the blocks at `places` (offset, number of bytes) of `region`, one after the other."""
    starts, sizes = _columns(places, region)
    native = _native()
    if native is None or not _is_long(sizes):
        return reference.digests(region, places)
    found = np.empty(len(sizes), np.uint64)
    native(len(sizes), _address(region), _address(starts), None, None, _address(sizes), _address(found))
    return found.astype(_BIG_ENDIAN).tobytes()


def digests_at(data: bytes, starts: Places, sizes: Places) -> npt.NDArray[np.uint64]:
    """The digests as numbers, of pieces of more than 240 bytes that may overlap. Raises InternalError."""
    if not len(sizes):
        return np.empty(0, np.uint64)
    if int(starts.min()) < 0 or int(sizes.min()) < _SHORTEST or int((starts + sizes).max()) > len(data):
        raise InternalError(f"a piece outside of {len(data)} bytes, or shorter than {_SHORTEST} bytes")
    native = _native()
    if native is None:
        return reference.numbers(data, starts.tolist(), sizes.tolist())
    found = np.empty(len(sizes), np.uint64)
    places = np.concatenate((starts, sizes))
    begin = places.ctypes.data
    native(len(sizes), _address(memoryview(data)), begin, None, None, begin + 8 * len(sizes), found.ctypes.data)
    return found


def copied(source: memoryview, places: Sequence[Place], target: memoryview, to: Sequence[Place]) -> bytes:
    """Copy the blocks at `places` of `source` to those of `target`; the digests of what was read, and so written.

    Both lists have the same sizes in the same order, and source and target do not overlap. Raises InternalError.
    """
    starts, sizes = _columns(places, source)
    stops, other_sizes = _columns(to, target)
    if not np.array_equal(sizes, other_sizes):
        raise InternalError("blocks are copied to places of other sizes")
    native = _native()
    if native is None or not _is_long(sizes):
        return reference.copied(source, places, target, to)
    found = np.empty(len(sizes), np.uint64)
    native(
        len(sizes),
        _address(source),
        _address(starts),
        _address(target),
        _address(stops),
        _address(sizes),
        _address(found),
    )
    return found.astype(_BIG_ENDIAN).tobytes()


def copies_natively() -> bool:
    """Whether `copied` is one pass here; without the native kernel it is two."""
    return _native() is not None


@cache
def _native() -> Function | None:
    return function("digest", [INT64, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS])


def _columns(places: Sequence[Place], region: memoryview) -> tuple[Places, Places]:
    """Offsets and sizes; raises InternalError when a block is not within the region."""
    table = np.array(places, np.int64).reshape(-1, 2)
    starts, sizes = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])
    if len(table) and (starts.min() < 0 or sizes.min() < 0 or (starts + sizes).max() > region.nbytes):
        raise InternalError(f"a block outside a region of {region.nbytes} bytes")
    return starts, sizes


def _is_long(sizes: Places) -> bool:
    return bool(len(sizes)) and int(sizes.min()) >= _SHORTEST


def _address(data: memoryview | npt.NDArray[np.generic]) -> int:
    array = np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data
    return array.ctypes.data
