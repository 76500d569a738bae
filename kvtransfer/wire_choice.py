"""Which wire dtype a pair of workers uses, decided from measured figures alone.

The default is `lossless`: what decode reads is what it would have computed itself, up to the type of its own cache, so
a disaggregated answer equals a colocated one. `auto` may give a little accuracy for time: a block in a narrower format
takes less time on the wire and more at its ends, and which of them wins depends on the pair.

    seconds for one layer of a block = wire bytes / bandwidth + cache bytes / conversion rate

The two are added: on a pipe slow enough for a narrower format to pay, hiding one behind the other changes little, and
an addition never promises what overlap may not keep. Where both caches hold the wire dtype nothing is converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import InternalError
from ..kernels.wire_format.formats import WIRE_DTYPES, narrowest_lossless, wire_layer_bytes

LEAST_GAIN = 0.1  # a lossier format must save this share of the time; less is within the noise of a measurement


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One layer of a block on the wire, and the cache dtypes at its two ends."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    source_dtype: str
    target_dtype: str

    def wire_bytes(self, wire_dtype: str) -> int:
        return wire_layer_bytes(self.block_size, self.num_kv_heads, self.head_dim, wire_dtype)

    def is_converted(self, wire_dtype: str) -> bool:
        """Whether anything but a copy happens to the numbers."""
        return not self.source_dtype == wire_dtype == self.target_dtype


def wire_candidates(shape: BlockShape) -> tuple[str, ...]:
    """What `auto` chooses from: the lossless format, then each that is smaller on the wire, the most exact first."""
    lossless = narrowest_lossless(shape.source_dtype, shape.target_dtype)
    return (lossless, *(name for name in WIRE_DTYPES if shape.wire_bytes(name) < shape.wire_bytes(lossless)))


def wire_seconds(
    shape: BlockShape, wire_dtype: str, bandwidth_bytes_per_s: float, convert_bytes_per_s: Mapping[str, float]
) -> float:
    """Seconds that one layer of a block takes in this format.

    `convert_bytes_per_s`: bytes of the source's cache that are encoded and decoded in a second, by format
    (`kernels.wire_format.measure`). Raises InternalError for a figure that is missing or not positive.
    """
    seconds = shape.wire_bytes(wire_dtype) / _positive("bandwidth_bytes_per_s", bandwidth_bytes_per_s)
    if shape.is_converted(wire_dtype):
        rate = _positive(f"convert_bytes_per_s[{wire_dtype}]", convert_bytes_per_s.get(wire_dtype, math.nan))
        seconds += shape.wire_bytes(shape.source_dtype) / rate
    return seconds


def choose_wire_dtype(
    candidates: Sequence[str],
    shape: BlockShape,
    bandwidth_bytes_per_s: float,
    convert_bytes_per_s: Mapping[str, float],
    least_gain: float = LEAST_GAIN,
) -> str:
    """The one of `candidates` (most exact first, as from `wire_candidates`) to use between these two workers.

    A later one is taken only where it saves more than `least_gain` of the time of the one it displaces. Raises
    InternalError, as `wire_seconds` does.
    """
    if not candidates:
        raise InternalError("candidates: none given")
    chosen, best = candidates[0], math.inf
    for name in candidates:
        seconds = wire_seconds(shape, name, bandwidth_bytes_per_s, convert_bytes_per_s)
        if best == math.inf or seconds < best * (1 - least_gain):
            chosen, best = name, seconds
    return chosen


def _positive(field: str, value: float) -> float:
    if not value > 0:
        raise InternalError(f"{field}: {value} is not a positive number of bytes per second")
    return value
