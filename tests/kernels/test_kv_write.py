from __future__ import annotations

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.kv_write import reference
from penstock.kernels.kv_write.op import clear_blocks, kv_rows, move_kv, store_kv


def empty_pool(dtype: torch.dtype, block_size: int) -> torch.Tensor:
    """7 blocks, 3 layers, 2 KV heads of 8."""
    return torch.full((7, 3, 2, block_size, 2, 8), float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_store_equals_reference(dtype: torch.dtype, block_size: int, layer: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randperm(7 * block_size, generator=generator)[:num_tokens]
    # As in the decoder, K and V are columns of a wider product.
    kv = torch.randn(num_tokens, 50, generator=generator).to(dtype)[:, 18:].view(num_tokens, 2, 16)
    actual, expected = empty_pool(dtype, block_size), empty_pool(dtype, block_size)
    store_kv(kv, actual, layer, kv_rows(slots, actual))
    k, v = kv.view(num_tokens, 2, 2, 8).unbind(1)
    reference.store_kv(k, v, expected, layer, slots)
    assert torch.equal(actual.nan_to_num(77), expected.nan_to_num(77))


@pytest.mark.parametrize(
    "kv", [torch.zeros(3, 2, 16), torch.zeros(2, 2, 8), torch.zeros(2, 2, 16, dtype=torch.bfloat16)]
)
def test_store_that_does_not_fit_is_refused(kv: torch.Tensor) -> None:
    pool = empty_pool(torch.float32, 4)
    with pytest.raises(InternalError, match=r"the pool takes \[2, 2, 16\]"):
        store_kv(kv, pool, 0, kv_rows(torch.tensor([3, 9]), pool))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_move_equals_reference(block_size: int, dtype: torch.dtype) -> None:
    """Slots that are read and written too, as those of a path that moves up."""
    generator = torch.Generator().manual_seed(block_size)
    pool = torch.randn(7, 3, 2, block_size, 2, 8, generator=generator).to(dtype)
    slots = torch.randperm(7 * block_size, generator=generator)[:6]
    sources, targets = slots[[1, 2, 4, 5]], slots[[0, 1, 2, 3]]
    actual, expected = pool.clone(), pool.clone()
    move_kv(actual, sources, targets)
    reference.move_kv(expected, sources, targets)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, pool)


def test_clear_zeroes_all_layers_of_the_named_blocks_only() -> None:
    pool = empty_pool(torch.float32, 4)
    clear_blocks(pool, torch.tensor([1, 6]))
    assert (pool[[1, 6]] == 0).all()
    assert pool[[0, 2, 3, 4, 5]].isnan().all()
