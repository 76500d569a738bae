from __future__ import annotations

from itertools import product

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.wire_format.formats import CACHE_DTYPES, WIRE_DTYPES, wire_layer_bytes
from penstock.kernels.wire_pack import reference
from penstock.kernels.wire_pack.op import pack, unpack
from penstock.tests.kernels.on_triton import DEVICE, run

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

import triton.language as tl  # noqa: E402

from penstock.kernels.wire_pack.kernel import part_offset  # noqa: E402

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPE = (6, 3, 2, 5, 2, 7)
BLOCKS = torch.tensor([4, 0, 5], device=DEVICE)
CASES = list(product(WIRE_DTYPES, CACHE_DTYPES))


def random_pool(cache: str, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Heads of very different size, ties, zeros, and some of every exponent."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(SHAPE, generator=generator) * spread
    pool[..., 0, :] *= 100
    pool[:, :, :, 3] = 0
    pool[:, :, :, 2] = 2.0 ** torch.randint(-140, 15, (6, 3, 2, 2, 7), generator=generator)
    largest = torch.finfo(TORCH[cache]).max
    return pool.clamp(-largest, largest).to(TORCH[cache]).to(DEVICE)


def empty_wire(wire_dtype: str, num_layers: int = 2, gap: int = 0, offset: int = 0) -> torch.Tensor:
    width = wire_layer_bytes(*SHAPE[3:], wire_dtype)
    rows = len(BLOCKS) * num_layers
    staging = torch.full((offset + rows * (width + gap),), 0xFF, dtype=torch.uint8, device=DEVICE)
    return staging[offset:].view(len(BLOCKS), num_layers, width + gap)[:, :, :width]


def expected_wire(pool: torch.Tensor, first_layer: int, wire_dtype: str) -> torch.Tensor:
    out = empty_wire(wire_dtype).cpu()
    reference.pack(pool.cpu(), BLOCKS.cpu(), first_layer, out, wire_dtype)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("spread", [1.0, 1e-38, 1e38])
@pytest.mark.parametrize(("wire_dtype", "cache"), CASES)
def test_pack_equals_reference_in_every_bit(wire_dtype: str, cache: str, spread: float) -> None:
    pool, out = random_pool(cache, spread), empty_wire(wire_dtype)
    run(pack, pool, BLOCKS, 1, out, wire_dtype)
    assert torch.equal(out.cpu(), expected_wire(pool, 1, wire_dtype))


@pytest.mark.parametrize("source", ["float32", "float16"])
@pytest.mark.parametrize(("wire_dtype", "cache"), CASES)
def test_unpack_equals_reference_in_every_bit(wire_dtype: str, cache: str, source: str) -> None:
    data = expected_wire(random_pool(source, 1e3), 0, wire_dtype)
    target = torch.full(SHAPE, torch.nan, dtype=TORCH[cache], device=DEVICE)
    expected = target.cpu().clone()
    run(unpack, data.to(DEVICE), target, BLOCKS, 1, wire_dtype)
    reference.unpack(data, expected, BLOCKS.cpu(), 1, wire_dtype)
    assert torch.equal(bits(target), bits(expected))


@pytest.mark.parametrize("op_path", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (3, 0), (4, 1), (0, 2)])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_wire_blocks_may_lie_at_any_address_and_distance(wire_dtype: str, gap: int, offset: int, op_path: bool) -> None:
    pool, out = random_pool("float32"), empty_wire(wire_dtype, gap=gap, offset=offset)
    whole = torch.as_strided(out, (out.untyped_storage().nbytes(),), (1,), 0)
    before = whole.clone()
    target, expected = torch.zeros_like(pool), torch.zeros_like(pool).cpu()
    if op_path:
        run(pack, pool, BLOCKS, 1, out, wire_dtype)
        run(unpack, out, target, BLOCKS, 1, wire_dtype)
    else:
        pack(pool, BLOCKS, 1, out, wire_dtype)
        unpack(out, target, BLOCKS, 1, wire_dtype)
    data = expected_wire(pool, 1, wire_dtype)
    assert torch.equal(out.cpu(), data)
    reference.unpack(data, expected, BLOCKS.cpu(), 1, wire_dtype)
    assert torch.equal(bits(target), bits(expected))
    out.fill_(0xFF)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("wire_dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_head_with_a_broken_number_is_broken_and_no_other(wire_dtype: str, bad: float) -> None:
    pool, out = random_pool("float32"), empty_wire(wire_dtype)
    pool[0, 1, 0, 2, 1, 3] = bad
    run(pack, pool, BLOCKS, 1, out, wire_dtype)
    assert torch.equal(out.cpu(), expected_wire(pool, 1, wire_dtype))
    target = torch.zeros_like(pool)
    run(unpack, out, target, BLOCKS, 1, wire_dtype)
    assert target[0, 1, 0, :, 1].isnan().all()
    assert int(target.isnan().sum()) == 5 * 7


@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_equal_types_copy_bits_even_of_numbers_that_are_none(cache: str) -> None:
    pool = random_pool(cache)
    pool.view(torch.uint8).flatten()[:] = torch.arange(pool.nbytes, device=DEVICE).mul(7919).to(torch.uint8)
    out, target = empty_wire(cache), torch.zeros_like(pool)
    run(pack, pool, BLOCKS, 0, out, cache)
    run(unpack, out, target, BLOCKS, 0, cache)
    assert torch.equal(bits(target[BLOCKS, :2]), bits(pool[BLOCKS, :2]))


@pytest.mark.parametrize("cache", ["bfloat16", "float16"])
def test_nan_stays_one_in_sixteen_bits(cache: str) -> None:
    pool, out = random_pool("float32"), empty_wire(cache)
    pool[4, 0, 0, 0, 0, 0] = torch.nan
    run(pack, pool, BLOCKS, 0, out, cache)
    assert out[0, 0, :2].view(TORCH[cache]).isnan().all()


def test_no_blocks_and_no_layers_are_no_work() -> None:
    pool = random_pool("float32")
    run(pack, pool, BLOCKS[:0], 0, empty_wire("int8")[:0], "int8")
    run(unpack, empty_wire("int8")[:, :0], pool, BLOCKS, 3, "int8")


@triton.jit
def _offsets(blocks, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, part_offset(tl.load(blocks + index), 60, 1, 61, 16 * 8 * 128))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_beyond_two_to_the_31_equal_their_twin(dtype: torch.dtype) -> None:
    blocks = torch.tensor([0, 17, 100_003, 2**31 - 1], dtype=dtype, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](blocks, out, SIZE=4)
    shape = torch.Size((2**31, 61, 2, 16, 8, 128))
    assert out.tolist() == [reference.part_offset(block, 60, 1, shape) for block in blocks.tolist()]
    assert reference.part_offset(4, 2, 1, torch.Size(SHAPE)) == torch.zeros(SHAPE)[4, 2, 1].storage_offset()


POOL = torch.zeros(SHAPE)
IDS = torch.tensor([4, 0, 5])
WIRE = torch.zeros(3, 2, 560, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pool", "ids", "first_layer", "wire", "message"),
    [
        (POOL[0], IDS, 0, WIRE, "the pool is"),
        (POOL.double(), IDS, 0, WIRE, "torch.float64"),
        (POOL, IDS.int(), 0, WIRE, "block_ids are"),
        (POOL, IDS, 0, WIRE[:2], r"takes \[3, layers, 560\]"),
        (POOL, IDS, 0, torch.zeros(3, 560, 2, dtype=torch.uint8).transpose(1, 2), "not dense"),
        (POOL, IDS, 2, WIRE, "2 layers from 2 on, of a pool with 3"),
        (POOL, IDS, -1, WIRE, "from -1 on"),
        (POOL, IDS, 0, WIRE.to("meta"), "wire is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(pool, ids, first_layer: int, wire, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        pack(pool, ids, first_layer, wire, "float32")
    with pytest.raises(InternalError, match=message):
        unpack(wire, pool, ids, first_layer, "float32")
