"""What travels on a link: blocks as they are, or converted on the way.

Workers whose caches have one format exchange blocks byte by byte. Otherwise, or when an 8-bit wire is wanted, each
layer of a block travels as a *wire block* (`kernels.wire_format`): the source encodes it into staging memory, the
destination decodes it out of its own, into whatever block size and dtype it has.
"""

from __future__ import annotations

import time

from ..core.errors import ConfigError, ProtocolError
from ..kernels.wire_format.formats import WIRE_DTYPES, narrowest_lossless
from ..protocol.messages import CONVERTIBLE_DTYPES, Fingerprint
from .figures import LinkFigures
from .wire_choice import BlockShape, choose_wire_dtype, wire_candidates

AS_THEY_ARE = ""


def negotiate(mine: Fingerprint, theirs: Fingerprint, setting: str, figures: LinkFigures) -> str:
    """The wire dtype for a link, AS_THEY_ARE when nothing has to be converted.

    `setting`: lossless converts only between caches that differ, and then loses nothing that the receiving cache keeps;
    auto may send 8 bits where the link is so slow that converting pays; or the name of a wire dtype.
    """
    if mine.dtype not in CONVERTIBLE_DTYPES:
        return AS_THEY_ARE
    lossless = AS_THEY_ARE if mine.is_same_format(theirs) else narrowest_lossless(theirs.dtype, mine.dtype)
    if setting == "lossless":
        return lossless
    if setting == "auto":
        return _by_measurement(mine, theirs, figures)
    same = mine.is_same_format(theirs) and setting == mine.dtype
    return AS_THEY_ARE if same else _known(setting)


def check_wire_dtype(mine: Fingerprint, theirs: Fingerprint, wire_dtype: str) -> None:
    """Raise ProtocolError unless blocks can travel like this between the two."""
    if wire_dtype == AS_THEY_ARE:
        fits = mine.is_same_format(theirs)
    else:
        fits = mine.dtype in CONVERTIBLE_DTYPES and wire_dtype in WIRE_DTYPES
    if not fits:
        formats = f"{mine.dtype}/{mine.block_size} here, {theirs.dtype}/{theirs.block_size} there"
        raise ProtocolError(f"wire_dtype {wire_dtype!r} cannot carry blocks between these caches: {formats}")


def _known(setting: str) -> str:
    if setting not in WIRE_DTYPES:
        names = ", ".join(["lossless", "auto", *WIRE_DTYPES])
        raise ConfigError(f"transfer.wire_dtype: {setting!r} is not one of {names}")
    return setting


def _by_measurement(mine: Fingerprint, theirs: Fingerprint, figures: LinkFigures) -> str:
    """The peer is the source: what its blocks would take on this link, in each format, against converting them."""
    import torch

    from ..kernels.wire_format.measure import measure_conversion

    shape = BlockShape(theirs.block_size, mine.num_kv_heads, mine.head_dim, theirs.dtype, mine.dtype)
    candidates = wire_candidates(shape)
    if not figures.gbps:
        chosen = candidates[0]
    else:
        numbers = (theirs.block_size, mine.num_kv_heads, mine.head_dim)
        types = (getattr(torch, theirs.dtype), getattr(torch, mine.dtype))
        rates = {
            name: measure_conversion(numbers, *types, name, time.perf_counter, num_wire_blocks=16, rounds=2)
            for name in candidates
        }
        chosen = choose_wire_dtype(candidates, shape, figures.gbps * 1e9, rates)
    return AS_THEY_ARE if mine.is_same_format(theirs) and chosen == mine.dtype else chosen
