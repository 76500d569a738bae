"""The names and sizes of what travels. Imports no torch: those who decide on a format read it.

One *wire block* is one layer of one block, whatever the caches on either side hold:

    [2 (K, V), block_size, num_kv_heads, head_dim] in the wire dtype, then for the 8-bit formats
    [2 (K, V), num_kv_heads] float32: the scale by which the numbers of that head are multiplied
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...core.errors import InternalError

# From the most exact to the least, as `benchmarks/wire_accuracy.py` finds them.
ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8_e4m3": 1})
WIRE_DTYPES = tuple(ITEM_BYTES)
CACHE_DTYPES = ("float32", "bfloat16", "float16")
_SCALE_BYTES = 4


def is_scaled(wire_dtype: str) -> bool:
    """Whether scales follow the numbers. Raises InternalError for a format that is none of ours."""
    return item_bytes(wire_dtype) == 1


def item_bytes(wire_dtype: str) -> int:
    if wire_dtype not in ITEM_BYTES:
        raise InternalError(f"wire_dtype: {wire_dtype!r} is not one of {', '.join(WIRE_DTYPES)}")
    return ITEM_BYTES[wire_dtype]


def wire_layer_bytes(block_size: int, num_kv_heads: int, head_dim: int, wire_dtype: str) -> int:
    """Bytes of one wire block, scales included."""
    scales = 2 * num_kv_heads * _SCALE_BYTES if is_scaled(wire_dtype) else 0
    return 2 * block_size * num_kv_heads * head_dim * item_bytes(wire_dtype) + scales


def narrowest_lossless(source_dtype: str, target_dtype: str) -> str:
    """The narrowest wire dtype that loses nothing but what the target's cache cannot hold anyway.

    That is the narrower of the two: sent as it is, a number is rounded once, at the target; sent in the target's type,
    once, at the source. Of bfloat16 and float16 neither holds the other, and both are 16 bits: the source's travels.
    """
    for field, dtype in (("source_dtype", source_dtype), ("target_dtype", target_dtype)):
        if dtype not in CACHE_DTYPES:
            raise InternalError(f"{field}: {dtype!r} is not one of {', '.join(CACHE_DTYPES)}")
    return target_dtype if ITEM_BYTES[target_dtype] < ITEM_BYTES[source_dtype] else source_dtype
