"""Gathering scattered blocks of the cache into contiguous wire blocks, and scattering them again, converted on the way.

A wire block is one layer of one block in the format of `kernels.wire_format`, bit for bit; NaN payloads alone may
differ where a type is converted.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from ..wire_format.formats import wire_layer_bytes
from ..wire_format.op import decode, encode

_CACHES = (torch.float32, torch.bfloat16, torch.float16)


def pack(kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, out: torch.Tensor, wire_dtype: str) -> None:
    """Write the wire blocks of these blocks and layers into out [n, layers, wire_layer_bytes] uint8.

    kv_pool [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim] float32, bfloat16 or float16,
    contiguous; block_ids [n] int64, within the pool; layers from `first_layer` on, as many as `out` holds. The bytes of
    a wire block are dense, at any distance from the next. Raises InternalError. Reference: `reference.pack`.
    """
    _check(kv_pool, block_ids, first_layer, out, wire_dtype)
    if runs_triton(kv_pool):
        from .kernel import launch_pack

        launch_pack(kv_pool, block_ids, first_layer, out, wire_dtype)
        return
    for place in range(out.shape[1]):
        encode(kv_pool[block_ids, first_layer + place], out[:, place], wire_dtype)


def unpack(
    data: torch.Tensor, kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, wire_dtype: str
) -> None:
    """Write the numbers of data [n, layers, wire_layer_bytes] into these blocks and layers: the reverse of `pack`.

    No block twice. Raises InternalError. Reference: `reference.unpack`.
    """
    _check(kv_pool, block_ids, first_layer, data, wire_dtype)
    if runs_triton(kv_pool):
        from .kernel import launch_unpack

        launch_unpack(data, kv_pool, block_ids, first_layer, wire_dtype)
        return
    for place in range(data.shape[1]):
        blocks = kv_pool.new_empty(len(block_ids), *kv_pool.shape[2:])
        decode(data[:, place], blocks, wire_dtype)
        kv_pool[block_ids, first_layer + place] = blocks


def _check(
    kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, wire: torch.Tensor, wire_dtype: str
) -> None:
    if kv_pool.dim() != 6 or kv_pool.shape[2] != 2 or kv_pool.dtype not in _CACHES or not kv_pool.is_contiguous():
        raise InternalError(f"the pool is {list(kv_pool.shape)} {kv_pool.dtype}, not a contiguous one of floats")
    width = wire_layer_bytes(kv_pool.shape[3], kv_pool.shape[4], kv_pool.shape[5], wire_dtype)
    if block_ids.dim() != 1 or block_ids.dtype != torch.int64 or not block_ids.is_contiguous():
        raise InternalError(f"block_ids are {list(block_ids.shape)} {block_ids.dtype}, not [n] int64")
    if wire.dim() != 3 or wire.shape[0] != len(block_ids) or wire.shape[2] != width or wire.dtype != torch.uint8:
        raise InternalError(
            f"wire blocks are {list(wire.shape)} {wire.dtype}, {wire_dtype} takes [{len(block_ids)}, layers, {width}]"
        )
    if wire.stride(2) != 1:
        raise InternalError(f"wire blocks are at strides {list(wire.stride())}, their bytes are not dense")
    if not 0 <= first_layer <= first_layer + wire.shape[1] <= kv_pool.shape[1]:
        raise InternalError(f"{wire.shape[1]} layers from {first_layer} on, of a pool with {kv_pool.shape[1]}")
    check_same_device(kv_pool=kv_pool, block_ids=block_ids, wire=wire)
