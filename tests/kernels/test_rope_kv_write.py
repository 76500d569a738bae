from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.rope_kv_write import layout, reference
from penstock.kernels.rope_kv_write.layout import CacheLayer, Rotation
from penstock.kernels.rope_kv_write.op import rope_kv_write
from penstock.tests.kernels.on_triton import DEVICE, DTYPES, assert_close, randn, run

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

import triton.language as tl  # noqa: E402

from penstock.kernels.rope_kv_write.kernel import scale_offset, slot_offset  # noqa: E402

EIGHT_BITS = [torch.float8_e4m3fn, torch.int8]


def rotation(num_tokens: int, head_dim: int) -> Rotation:
    angles = torch.outer(torch.arange(50.0), 100 ** (-torch.arange(0, 1, 2 / head_dim)))
    positions = torch.arange(3, 3 + num_tokens)
    return Rotation(angles.cos().to(DEVICE), angles.sin().to(DEVICE), positions.to(DEVICE))


def empty_cache(dtype: torch.dtype, block_size: int, num_kv_heads: int, head_dim: int) -> CacheLayer:
    """7 blocks and 3 layers of what nobody has written: NaN, or the largest code and NaN scales."""
    shape = (7, 3, 2, block_size, num_kv_heads, head_dim)
    if dtype not in EIGHT_BITS:
        return CacheLayer(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE), 1)
    codes = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype)
    return CacheLayer(codes, 1, torch.full((7, 3, 2, num_kv_heads), torch.nan, device=DEVICE))


def on_cpu(cache: CacheLayer) -> CacheLayer:
    scales = None if cache.scales is None else cache.scales.cpu().clone()
    return CacheLayer(cache.kv_pool.cpu().clone(), cache.layer, scales)


def expected_of(qkv, num_heads: int, turn: Rotation | None, cache: CacheLayer, slots: torch.Tensor) -> torch.Tensor:
    """What the reference makes of copies; `cache` is one already."""
    own = qkv.cpu().clone()
    turn = turn and Rotation(turn.cos.cpu(), turn.sin.cpu(), turn.positions.cpu())
    reference.rope_kv_write(own, num_heads, turn, cache, slots.cpu())
    return own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_tokens"),
    [(1, 1, 2, 1, 1), (6, 2, 10, 3, 5), (9, 3, 64, 16, 2), (5, 5, 6, 4, 7)],
)
def test_equals_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, num_tokens: int, turns: bool, dtype: torch.dtype
) -> None:
    slots = torch.randperm(7 * block_size, generator=torch.Generator().manual_seed(1))[:num_tokens].to(DEVICE)
    if num_tokens > 2:
        slots[1] = -1
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    cache = empty_cache(dtype, block_size, num_kv_heads, head_dim)
    turn = rotation(num_tokens, head_dim) if turns else None
    wanted = on_cpu(cache)
    expected = expected_of(qkv, num_heads, turn, wanted, slots)
    run(rope_kv_write, qkv, num_heads, turn, cache, slots)
    assert_close(qkv, expected)
    untouched = wanted.kv_pool.isnan()
    assert torch.equal(cache.kv_pool.cpu().isnan(), untouched)
    assert_close(cache.kv_pool.nan_to_num(77), wanted.kv_pool.nan_to_num(77))


def numbers(cache: CacheLayer) -> torch.Tensor:
    assert cache.scales is not None
    return (cache.kv_pool.cpu().float() * cache.scales.cpu()[:, :, :, None, :, None]).nan_to_num(1e9)


STEPS = [  # the slots of each step: blocks begin, go on, fill and begin anew; one token pads
    [8, 9, 10, 4, 20, -1],
    [11, 5, 6, 7, 21],
    [12, 13, 14, 15, 22, 23],
    [8, 9, 24],
]


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("turns", [True, False])
def test_eight_bit_cache_over_several_steps_equals_reference(dtype: torch.dtype, turns: bool) -> None:
    cache = empty_cache(dtype, 4, 3, 6)
    wanted = on_cpu(cache)
    for step, slots in enumerate(STEPS):
        qkv = randn(len(slots), (2 + 6) * 6, seed=step) * 2.0 ** (step % 3)
        turn = rotation(len(slots), 6) if turns else None
        expected = expected_of(qkv, 2, turn, wanted, torch.tensor(slots))
        run(rope_kv_write, qkv, 2, turn, cache, torch.tensor(slots, device=DEVICE))
        assert_close(qkv, expected)
        assert cache.scales is not None
        assert wanted.scales is not None
        torch.testing.assert_close(cache.scales.cpu(), wanted.scales, rtol=1e-6, atol=0, equal_nan=True)
        # A rotation that rounds otherwise may land on the neighbouring code.
        step_size = 1.001 * wanted.scales[:, :, :, None, :, None].nan_to_num(1) * (1 if dtype == torch.int8 else 32)
        difference = (numbers(cache) - numbers(wanted)).abs()
        assert (difference <= step_size).all()
        assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_numbers_read_back_within_the_stated_error(dtype: torch.dtype) -> None:
    """Tokens come one a step and grow, so that every one of them makes the scale grow."""
    cache, block_size = empty_cache(dtype, 16, 2, 8), 16
    tokens = randn(block_size, (1 + 4) * 8) * torch.linspace(1, 40, block_size, device=DEVICE)[:, None]
    for token in range(block_size):
        run(rope_kv_write, tokens[token : token + 1], 1, None, cache, torch.tensor([32 + token], device=DEVICE))
    stored = numbers(cache)[2, 1]
    given = tokens[:, 8:].cpu().view(block_size, 2, 2, 8).transpose(0, 1)
    assert cache.scales is not None
    scale = cache.scales.cpu()[2, 1][:, None, :, None]
    bound = block_size / 2 * scale if dtype == torch.int8 else given.abs() * 2**-4 + scale * 2**-10
    assert ((stored - given).abs() <= bound * 1.0001).all()


def test_fp8_growth_is_exact() -> None:
    """The same block in one step and in many."""
    tokens = randn(16, (1 + 4) * 8) * torch.linspace(1, 40, 16, device=DEVICE)[:, None]
    at_once, one_by_one = (empty_cache(torch.float8_e4m3fn, 16, 2, 8) for _ in range(2))
    run(rope_kv_write, tokens.clone(), 1, None, at_once, torch.arange(16, device=DEVICE))
    for token in range(16):
        slots = torch.tensor([token], device=DEVICE)
        run(rope_kv_write, tokens[token : token + 1].clone(), 1, None, one_by_one, slots)
    assert torch.equal(at_once.kv_pool.view(torch.uint8)[0], one_by_one.kv_pool.view(torch.uint8)[0])


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_number_breaks_its_head_until_the_block_begins_anew(dtype: torch.dtype, bad: float) -> None:
    cache = empty_cache(dtype, 4, 2, 4)
    assert cache.scales is not None
    qkv = randn(2, (1 + 4) * 4)
    qkv[0, 5] = bad  # the first KV head's key
    run(rope_kv_write, qkv, 1, None, cache, torch.tensor([4, 5], device=DEVICE))
    assert cache.scales[1, 1, 0].isnan().tolist() == [True, False]
    assert not cache.scales[1, 1, 1].isnan().any()
    run(rope_kv_write, randn(1, 20), 1, None, cache, torch.tensor([6], device=DEVICE))
    assert cache.scales[1, 1, 0].isnan().tolist() == [True, False]
    run(rope_kv_write, randn(1, 20), 1, None, cache, torch.tensor([4], device=DEVICE))
    assert not cache.scales[1, 1].isnan().any()


@triton.jit
def _offsets(slots, of_slots, of_scales, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    slot = tl.load(slots + index)
    tl.store(of_slots + index, slot_offset(slot, 60, 1, 61, BLOCK_SIZE, 8 * 128))
    tl.store(of_scales + index, scale_offset(slot // BLOCK_SIZE, 60, 1, 61, 8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_beyond_two_to_the_31_equal_their_twins(dtype: torch.dtype) -> None:
    """Slots of 32 bits too: the product is what has to be wide."""
    slots = torch.tensor([0, 17, 1_000_003, 2**31 - 2], dtype=dtype, device=DEVICE)
    of_slots, of_scales = (torch.zeros(4, dtype=torch.int64, device=DEVICE) for _ in range(2))
    _offsets[(1,)](slots, of_slots, of_scales, SIZE=4, BLOCK_SIZE=16)
    shape = torch.Size((2**27, 61, 2, 16, 8, 128))
    assert of_slots.tolist() == [layout.slot_offset(slot, 60, 1, shape) for slot in slots.tolist()]
    assert of_scales.tolist() == [layout.scale_offset(slot // 16, 60, 1, shape) for slot in slots.tolist()]
    assert max(of_slots.tolist()) > 2**31
    assert max(of_scales.tolist()) > 2**31


def test_twin_is_where_torch_finds_the_slot() -> None:
    pool = torch.zeros(7, 3, 2, 4, 2, 6)
    scales = torch.zeros(7, 3, 2, 2)
    assert layout.slot_offset(22, 2, 1, pool.shape) == pool[5, 2, 1, 2].storage_offset()
    assert layout.scale_offset(5, 2, 1, pool.shape) == scales[5, 2, 1].storage_offset()


CACHE = CacheLayer(torch.zeros(7, 3, 2, 4, 2, 6), 1)
SLOTS = torch.tensor([3, 9])
QKV = torch.zeros(2, 30)


@pytest.mark.parametrize(
    ("qkv", "cache", "slots", "message"),
    [
        (QKV[:, :24], CACHE, SLOTS, r"\[num_tokens, 30\] in dense rows"),
        (QKV, CACHE, SLOTS[:1], r"slot_mapping is \[1\]"),
        (QKV, CACHE, SLOTS.int(), "torch.int32, not"),
        (QKV, replace(CACHE, layer=3), SLOTS, "layer 3 of a pool with 3"),
        (QKV.half(), CACHE, SLOTS, "torch.float32 without scales, qkv is torch.float16"),
        (QKV, replace(CACHE, kv_pool=CACHE.kv_pool.to(torch.int8)), SLOTS, "torch.int8 without scales"),
        (QKV, CacheLayer(CACHE.kv_pool.to(torch.int8), 1, torch.zeros(7, 3, 2)), SLOTS, r"scales are \[7, 3, 2\]"),
        (QKV, replace(CACHE, kv_pool=CACHE.kv_pool[..., 0]), SLOTS, "not of 6 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(qkv, cache: CacheLayer, slots, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        rope_kv_write(qkv, 1, None, cache, slots)


def test_angles_that_do_not_fit_are_refused() -> None:
    table = torch.zeros(9, 3)
    with pytest.raises(InternalError, match="cos is"):
        rope_kv_write(QKV, 1, Rotation(torch.zeros(9, 4), table, SLOTS), CACHE, SLOTS)
    with pytest.raises(InternalError, match="positions are"):
        rope_kv_write(QKV, 1, Rotation(table, table, SLOTS[:1]), CACHE, SLOTS)
