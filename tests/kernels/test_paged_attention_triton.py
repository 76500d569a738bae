"""The Triton kernels against the reference: on the device where there is one, through the interpreter elsewhere.

Slots outside the contexts hold NaN, and so does every result before it is written.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.errors import ConfigError, InternalError
from penstock.kernels.paged_attention import bench, op, reference
from penstock.kernels.paged_attention.addressing import PoolLayout, scale_offsets, slot_offsets
from penstock.kernels.paged_attention.device_plan import (
    MAX_SPLITS,
    SPLIT_KEYS,
    DevicePlan,
    PlanBuffers,
    build_device_plan,
    choose_splits,
)
from penstock.kernels.paged_attention.plan import SHORT_QUERY, PoolShape, build_plan
from penstock.kernels.paged_attention.tree import CAUSAL, pack_tree, unpack_tree
from penstock.tests.kernels import on_triton
from penstock.tests.kernels.tolerances import TOLERANCES

triton = pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")
tl = pytest.importorskip("triton.language")
kernel = pytest.importorskip("penstock.kernels.paged_attention.kernel")
key_loop = pytest.importorskip("penstock.kernels.paged_attention.key_loop")

DEVICE = torch.device(on_triton.DEVICE)
NUM_LAYERS = 2
LAYER = 1
SCALE = 0.3
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype | None = None
    group: int = 2
    num_kv_heads: int = 2
    block_size: int = 16
    head_dim: int = 64
    window: int | None = None
    num_splits: int | None = None


@dataclass(frozen=True)
class Case:
    """A ragged batch with its pool filled; `check` compares."""

    shape: Shape
    q: torch.Tensor
    pool: torch.Tensor
    scales: torch.Tensor | None
    plan: DevicePlan
    tree: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        return on_triton.run(
            op.paged_attention,
            self.q,
            self.pool,
            LAYER,
            self.plan,
            scale=SCALE,
            window=self.shape.window,
            tree=self.tree,
            kv_scales=self.scales,
        )

    def check(self) -> None:
        expected = reference.paged_attention(
            self.q, self.pool, LAYER, self.plan, SCALE, self.shape.window, tree=self.tree, kv_scales=self.scales
        )
        on_triton.assert_close(self.run(), expected)


def make_case(lengths: list[tuple[int, int]], shape: Shape, seed: int = 0) -> Case:
    """`lengths`: for each sequence (tokens already in the pool, new tokens). Blocks are dealt out in random order."""
    order, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    context_lens = np.array([earlier + new for earlier, new in lengths])
    needed = [-(-int(length) // shape.block_size) for length in context_lens]
    block_ids = list(range(sum(needed) + 2))
    order.shuffle(block_ids)
    tables = [[block_ids.pop() for _ in range(count)] for count in needed]
    size = (sum(needed) + 2, NUM_LAYERS, 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    pool, scales = _numbers(size, shape, generator)
    _poison(pool, tables, context_lens.tolist())
    block_table = np.array([table + [0] * (max(needed) - len(table)) for table in tables])
    cu_seqlens_q = np.cumsum([0, *(new for _, new in lengths)])
    plan = build_device_plan(cu_seqlens_q, context_lens, block_table, DEVICE, shape.num_splits)
    num_heads = shape.num_kv_heads * shape.group
    q = torch.randn(plan.num_tokens, num_heads + 3, shape.head_dim, generator=generator).to(shape.dtype).to(DEVICE)
    return Case(shape, q[:, :num_heads], pool.to(DEVICE), None if scales is None else scales.to(DEVICE), plan)


def _numbers(
    size: tuple[int, ...], shape: Shape, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    values = torch.randn(size, generator=generator)
    if shape.pool_dtype is None:
        return values.to(shape.dtype), None
    scales = (0.5 + torch.rand(*size[:3], size[4], generator=generator)) * 4 / LARGEST[shape.pool_dtype]
    codes = values / scales[:, :, :, None, :, None]
    return (codes.round() if shape.pool_dtype == torch.int8 else codes).to(shape.pool_dtype), scales


def _poison(pool: torch.Tensor, tables: list[list[int]], context_lens: list[int]) -> None:
    """NaN in every slot outside the contexts; int8 has none, its largest number has to do."""
    block_size = pool.shape[3]
    is_used = torch.zeros(pool.shape[0], block_size, dtype=torch.bool)
    for table, length in zip(tables, context_lens, strict=True):
        for token in range(length):
            is_used[table[token // block_size], token % block_size] = True
    poison = torch.tensor(127 if pool.dtype == torch.int8 else float("nan")).to(pool.dtype)
    by_slot = pool.permute(0, 3, 1, 2, 4, 5)
    for block, slot in (~is_used).nonzero().tolist():
        by_slot[block, slot] = poison


DECODES = [(0, 1), (36, 1), (131, 1), (15, 1)]
MIXED = [(40, 1), (0, 19), (61, 5), (0, 1), (33, 40), (5, 16)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(1, 64, 8), (3, 80, 16), (4, 96, 32), (8, 128, 64), (5, 64, 16), (7, 128, 8)]
)
def test_mixed_batch_equals_reference(dtype: torch.dtype, group: int, head_dim: int, block_size: int) -> None:
    make_case(MIXED, Shape(dtype, group=group, head_dim=head_dim, block_size=block_size)).check()


@pytest.mark.parametrize("window", [1, 7, 32, 70, 500])
@pytest.mark.parametrize("num_splits", [None, 3])
def test_window_equals_reference(window: int, num_splits: int | None) -> None:
    make_case([*MIXED, (150, 1)], Shape(window=window, num_splits=num_splits)).check()


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_equal_reference(num_splits: int, dtype: torch.dtype) -> None:
    # A context of one token leaves most of the splits empty.
    make_case([*DECODES, (300, 3)], Shape(dtype, group=3, num_splits=num_splits)).check()


@pytest.mark.parametrize("pool_dtype", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_8_bit_pool_equals_reference(dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    make_case(MIXED, Shape(dtype, pool_dtype, group=3, head_dim=80, block_size=8)).check()
    make_case(DECODES, Shape(dtype, pool_dtype, group=2, window=20, num_splits=2)).check()


def test_float32_queries_on_a_16_bit_pool_equal_reference() -> None:
    case = make_case(MIXED, Shape(torch.bfloat16, group=3))
    replace(case, q=case.q.float()).check()


def random_tree(query_lens: list[int], seed: int) -> torch.Tensor:
    """Each token but the first hangs below a random earlier one."""
    order = random.Random(seed)
    mask = torch.zeros(sum(query_lens), max(query_lens), dtype=torch.bool)
    row = 0
    for length in query_lens:
        for index in range(length):
            if index:
                mask[row + index] = mask[row + order.randrange(index)]
            mask[row + index, index] = True
        row += length
    return mask


@pytest.mark.parametrize("window", [None, 20, 33])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_tree_equals_reference(window: int | None, num_splits: int) -> None:
    lengths = [(0, 6), (50, SHORT_QUERY), (31, 1), (64, 9), (7, 12)]
    case = make_case(lengths, Shape(group=3, window=window, num_splits=num_splits))
    tree = pack_tree(random_tree([new for _, new in lengths], seed=5)).to(DEVICE)
    replace(case, tree=tree).check()
    assert not torch.equal(replace(case, tree=tree).run(), case.run())


def test_tree_of_chains_is_causal() -> None:
    case = make_case(MIXED, Shape(window=40))
    tree = torch.full((case.plan.num_tokens,), CAUSAL, device=DEVICE)
    assert torch.equal(replace(case, tree=tree).run(), case.run())


def test_packed_tree_unpacks_to_its_mask() -> None:
    mask = random_tree([6, 16, 1], seed=1)
    assert torch.equal(unpack_tree(pack_tree(mask), [0, 6, 22, 23]), mask)


@pytest.mark.parametrize("seed", range(12))
def test_any_batch_equals_reference(seed: int) -> None:
    order = random.Random(seed)
    lengths = [(order.randint(0, 90), order.choice([1, 1, 2, 5, 16, 17, 33])) for _ in range(order.randint(1, 4))]
    shape = Shape(
        dtype=order.choice(list(TOLERANCES)),
        pool_dtype=order.choice([None, None, *LARGEST]),
        group=order.randint(1, 8),
        num_kv_heads=order.randint(1, 3),
        block_size=order.choice([8, 16, 32, 64]),
        head_dim=order.choice([64, 80, 96, 128]),
        window=order.choice([None, order.randint(1, 80)]),
        num_splits=order.choice([None, 2, 5]),
    )
    make_case(lengths, shape, seed).check()


def test_chunks_of_a_prompt_equal_the_whole() -> None:
    """The rows of a prompt computed at once and in two chunks: keys that are not there yet do not count."""
    whole = make_case([(0, 70)], Shape(group=3))
    table = whole.plan.block_table.cpu().numpy()
    parts = []
    for start, stop in ((0, 31), (31, 70)):
        plan = build_device_plan(np.array([0, stop - start]), np.array([stop]), table, DEVICE)
        parts.append(replace(whole, q=whole.q[start:stop], plan=plan).run())
    on_triton.assert_close(torch.cat(parts), whole.run())


def test_padding_sequence_yields_zeros() -> None:
    case = make_case([(20, 1), (30, 1)], Shape(num_splits=2))
    plan = build_device_plan(
        np.array([0, 1, 2]), np.array([21, 0]), case.plan.block_table.cpu().numpy(), DEVICE, num_splits=2
    )
    for padded in (plan, replace(plan, num_splits=1)):
        out = replace(case, plan=padded).run()
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert torch.equal(out[0], replace(case, plan=replace(case.plan, num_splits=padded.num_splits)).run()[0])


def test_plan_buffers_keep_their_addresses() -> None:
    buffers = PlanBuffers(4, 10, DEVICE)
    first = buffers.fill(np.array([0, 1, 20]), np.array([9, 40]), np.arange(6).reshape(2, 3))
    addresses = [t.data_ptr() for t in (first.cu_seqlens_q, first.context_lens, first.block_table, first.short_seqs)]
    assert (first.short_seqs.tolist(), first.long_seqs.tolist()) == ([0], [1])
    assert (first.max_short_query, first.max_long_query, first.max_context_len) == (1, 19, 40)
    second = buffers.fill(np.array([0, 2, 3, 4]), np.array([9, 40, 5]), 7 + np.arange(30).reshape(3, 10))
    again = [t.data_ptr() for t in (second.cu_seqlens_q, second.context_lens, second.block_table, second.short_seqs)]
    assert addresses == again
    assert second.block_table.tolist() == (7 + np.arange(30).reshape(3, 10)).tolist()
    assert (second.short_seqs.tolist(), second.long_seqs.tolist(), second.num_tokens) == ([0, 1, 2], [], 4)


def test_batch_beyond_the_buffers_is_refused() -> None:
    buffers = PlanBuffers(1, 3, DEVICE)
    with pytest.raises(InternalError, match="2 sequences of 3 blocks, the buffers hold 1 of 3"):
        buffers.fill(np.array([0, 1, 2]), np.array([9, 9]), np.zeros((2, 3), dtype=np.int64))


@pytest.mark.parametrize(
    ("num_seqs", "num_kv_heads", "max_keys", "expected"),
    [
        (1, 8, 100_000, 32),
        (1, 1, 1_000_000, MAX_SPLITS),
        (1, 8, 4 * SPLIT_KEYS, 4),
        (1, 8, SPLIT_KEYS - 1, 1),
        (64, 8, 100_000, 1),
        (4, 8, 100_000, 8),
    ],
)
def test_splits_fill_the_processors(num_seqs: int, num_kv_heads: int, max_keys: int, expected: int) -> None:
    assert choose_splits(num_seqs, num_kv_heads, max_keys, num_processors=132) == expected


LAYOUT = PoolLayout(num_layers=80, block_size=16, num_kv_heads=8, head_dim=128)
BLOCK_IDS = np.array([0, 3, 5_000, 819_200, 2_000_000])


def test_twin_offsets_are_those_of_torch_beyond_2_to_the_31() -> None:
    strides = torch.empty(2_000_001, 80, 2, 16, 8, 128, device="meta").stride()
    slots = np.array([0, 15, 7, 1, 15])
    offsets = slot_offsets(BLOCK_IDS, 79, 1, slots, 5, LAYOUT)
    assert offsets.max() > 2**31
    for block, slot, offset in zip(BLOCK_IDS.tolist(), slots.tolist(), offsets.tolist(), strict=True):
        index = (block, 79, 1, slot, 5)
        assert offset == sum(place * stride for place, stride in zip(index, strides, strict=False))
    scales = scale_offsets(BLOCK_IDS, 79, 1, 5, LAYOUT).tolist()
    assert scales == [((block * 80 + 79) * 2 + 1) * 8 + 5 for block in BLOCK_IDS.tolist()]


@triton.jit
def _write_offsets(blocks, slots, out, scales_out, layer, head):
    places = tl.arange(0, 8)
    block_ids = tl.load(blocks + places)
    offsets = key_loop.slot_offsets(block_ids, layer, 1, tl.load(slots + places), head, 80, 16, 8, 128)
    tl.store(out + places, offsets)
    tl.store(scales_out + places, key_loop.scale_offsets(block_ids, layer, 1, head, 80, 8))


def test_kernel_offsets_equal_their_twin_beyond_2_to_the_31() -> None:
    blocks, slots = np.resize(BLOCK_IDS, 8), np.array([0, 1, 2, 7, 8, 13, 14, 15])
    out, scales_out = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)
    on_device = [torch.from_numpy(values.astype(np.int32)).to(DEVICE) for values in (blocks, slots)]
    _write_offsets[(1,)](*on_device, out, scales_out, 79, 5)
    assert out.tolist() == slot_offsets(blocks, 79, 1, slots, 5, LAYOUT).tolist()
    assert scales_out.tolist() == scale_offsets(blocks, 79, 1, 5, LAYOUT).tolist()


class OnCuda:
    """Stands in for a tensor on a CUDA device, as far as `op` looks at it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cuda")


def test_op_calls_the_kernels_for_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(3, 1)], Shape(window=30))
    tree = torch.full((1,), CAUSAL, device=DEVICE)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(kernel, "paged_attention", lambda *args: calls.append(args))
    q: Any = OnCuda(case.q)
    op.paged_attention(q, case.pool, LAYER, case.plan, scale=SCALE, window=30, tree=tree)
    assert calls == [(q, case.pool, LAYER, case.plan, SCALE, 30, tree, None)]


def test_op_without_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(3, 1)], Shape())
    for name in [name for name in sys.modules if name.startswith("penstock.kernels.paged_attention.")]:
        if name.rsplit(".", 1)[1] in {"kernel", "decode_kernel", "prefill_kernel", "key_loop", "tuning"}:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("penstock.kernels.paged_attention.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    q: Any = OnCuda(case.q)
    with pytest.raises(ConfigError, match=r"needs triton; install penstock\[gpu\]"):
        op.paged_attention(q, case.pool, LAYER, case.plan, scale=SCALE)


def test_op_does_not_load_triton() -> None:
    code = """
import sys
import penstock.kernels.paged_attention.op
assert "penstock.kernels.paged_attention.kernel" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_op_refuses_what_the_kernels_cannot_take() -> None:
    case = make_case([(3, 1), (20, 2)], Shape())
    q, pool, plan = case.q.cpu(), case.pool.cpu(), case.plan
    host_plan = build_plan(np.array([0, 3]), np.array([3]), np.array([[0]]), PoolShape(2, 16, 2, torch.float32))
    with pytest.raises(InternalError, match="a CUDA device attention takes a DevicePlan"):
        op.paged_attention(OnCuda(q), pool, 0, host_plan, scale=SCALE)  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="context of 33 tokens in 2 blocks of 16"):
        op.paged_attention(q, pool, 0, replace(plan, max_context_len=33), scale=SCALE)
    with pytest.raises(InternalError, match=r"tree is \[2\] torch\.int64, not \[3\]"):
        op.paged_attention(q, pool, 0, plan, scale=SCALE, tree=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InternalError, match="window of 5 tokens may cut a tree"):
        op.paged_attention(q, pool, 0, plan, scale=SCALE, window=5, tree=torch.full((3,), CAUSAL))
    with pytest.raises(InternalError, match=r"a pool of torch\.int8 without scales"):
        op.paged_attention(q, pool.to(torch.int8), 0, plan, scale=SCALE)
    scales = torch.ones(pool.shape[0], 2, 2, 2)
    with pytest.raises(InternalError, match=r"a pool of torch\.float32 with scales"):
        op.paged_attention(q, pool, 0, plan, scale=SCALE, kv_scales=scales)
    with pytest.raises(InternalError, match=r"kv_scales are \[2, 2\] torch\.float32, not \[5, 2, 2, 2\]"):
        op.paged_attention(q, pool.to(torch.int8), 0, plan, scale=SCALE, kv_scales=scales[0, 0])


@pytest.mark.parametrize("pool_dtype", [None, torch.int8])
def test_op_on_a_cpu_takes_trees_and_8_bit_pools_to_the_reference(pool_dtype: torch.dtype | None) -> None:
    case = make_case([(3, 2), (20, 3)], Shape(pool_dtype=pool_dtype))
    tree = pack_tree(random_tree([2, 3], seed=3))
    plan = build_device_plan(
        np.array([0, 2, 5]), np.array([5, 23]), case.plan.block_table.cpu().numpy(), torch.device("cpu")
    )
    q, pool, scales = case.q.cpu(), case.pool.cpu(), None if case.scales is None else case.scales.cpu()
    expected = reference.paged_attention(q, pool, LAYER, plan, SCALE, None, tree, scales)
    assert torch.equal(op.paged_attention(q, pool, LAYER, plan, scale=SCALE, tree=tree, kv_scales=scales), expected)


def visible_keys(mask: torch.Tensor, earlier: int, window: int | None) -> list[list[int]]:
    """What the rows of a tree see when a zero query averages one-hot values, by the reference."""
    num_keys = earlier + mask.shape[0]
    pool = torch.zeros(1, 1, 2, num_keys, 1, num_keys)
    pool[0, 0, 1, :, 0] = torch.eye(num_keys)
    plan = build_device_plan(np.array([0, mask.shape[0]]), np.array([num_keys]), np.array([[0]]), torch.device("cpu"))
    q = torch.zeros(mask.shape[0], 1, num_keys)
    out = reference.paged_attention(q, pool, 0, plan, SCALE, window, pack_tree(mask))
    return [row.nonzero().flatten().tolist() for row in out[:, 0]]


def test_reference_tree_shows_a_row_its_ancestors() -> None:
    # Token 0 has the children 1 and 2; token 3 is a child of 1.
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    assert visible_keys(mask, 2, None) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3, 5]]
    assert visible_keys(mask, 2, 3) == [[0, 1, 2], [1, 2, 3], [1, 2, 4], [2, 3, 5]]


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, *LARGEST], ids=str)
def test_bench_inputs_pass_their_own_check(pool_dtype: torch.dtype) -> None:
    heads = bench.Heads(num_kv_heads=2, group=3, head_dim=64, block_size=16, pool_dtype=pool_dtype)
    decode = bench.make_inputs(heads, 2, 40, 1, DEVICE)
    on_triton.run(decode.check)
    on_triton.run(bench.make_inputs(heads, 2, 21, 20, DEVICE).check)
    assert decode.work().nbytes == 2 * (2 * 41 * 2 * 64 * pool_dtype.itemsize + 2 * 6 * 64 * 2)
    assert decode.work().operations == 2 * 41 * 6 * 64 * 4


def test_bench_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "CUDA device" in capsys.readouterr().err
