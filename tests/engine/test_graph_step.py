"""Decode steps with padding, ids that stay on the device and a read-back one step late, against the plain loop.

On a CUDA device the same tests run through captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock.core.errors import InternalError
from penstock.engine.batch import Ints
from penstock.engine.decode_batch import DecodeBatch, Draws
from penstock.engine.decode_loop import Decoding, decode
from penstock.engine.graph_step import GraphStep, Ids, padded_size
from penstock.engine.model_runner import pool_view
from penstock.engine.sequence import blocks_for
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.kernels.choice import triton_everywhere
from penstock.kernels.paged_attention.device_plan import DevicePlan
from penstock.models.device_decoder import DeviceDecoder, DevicePool, make_pool
from penstock.models.weights import load_weights
from penstock.protocol.sampling import SamplingParams
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

CONFIG = tiny_config()
BLOCK_SIZE = 4
NUM_BLOCKS = 64
NUM_NEW = 9
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=5, ignore_eos=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def decoder() -> DeviceDecoder:
    tensors = ((name, tensor.to(DEVICE)) for name, tensor in random_weights(CONFIG).items())
    return DeviceDecoder(CONFIG, load_weights(CONFIG, tensors, torch.float32), 64)


@pytest.fixture
def pool() -> DevicePool:
    return make_pool(CONFIG, NUM_BLOCKS, BLOCK_SIZE, torch.float32, DEVICE)


class Prompted:
    """Sequences whose prompts the CPU's engine has computed, in a pool of its own that is copied to the device.

    tokens: what the plain loop goes on to, greedily or by `params`.
    """

    def __init__(self, pool: DevicePool, lengths: list[int], params: SamplingParams | None = None) -> None:
        self.lengths = lengths
        engine = _engine()
        stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE)
        prompts = [torch.arange(length).mul(37 + length).remainder(320).tolist() for length in lengths]
        seqs = [stepper.add(prompt, params) for prompt in prompts]
        for seq in seqs:  # blocks for all that comes
            seq.block_table = [stepper.free.pop() for _ in range(blocks_for(len(seq.prompt_ids) + NUM_NEW, BLOCK_SIZE))]
        stepper.generate(engine, seqs, 1)
        shape = engine.decoder.config, BLOCK_SIZE, torch.float32
        pool.numbers.copy_(pool_view(engine.memory, *shape))
        self.tables = [np.array(seq.block_table) for seq in seqs]
        self.first_ids = [seq.output_ids[0] for seq in seqs]
        stepper.generate(engine, seqs, NUM_NEW)
        self.tokens = [seq.output_ids[1:] for seq in seqs]

    def decodings(self, num_new: list[int] | None = None) -> list[Decoding]:
        counts = num_new or [NUM_NEW - 1] * len(self.lengths)
        return [
            Decoding(table, length, first, count)
            for table, length, first, count in zip(self.tables, self.lengths, self.first_ids, counts, strict=True)
        ]

    def batch(self, number: int, params: SamplingParams | None = None) -> DecodeBatch:
        """Step `number` of all the sequences; the host knows no id but the first."""
        num_seqs, width = len(self.lengths), max(map(len, self.tables))
        draws = (
            None
            if params is None
            else Draws(
                seeds=np.full(num_seqs, params.seed),
                indices=np.full(num_seqs, 1 + number),
                temperature=np.full(num_seqs, params.temperature, dtype=np.float32),
                top_k=np.full(num_seqs, params.top_k),
                top_p=np.full(num_seqs, params.top_p, dtype=np.float32),
                min_p=np.full(num_seqs, params.min_p, dtype=np.float32),
            )
        )
        return DecodeBatch(
            context_lens=np.array(self.lengths) + 1 + number,
            block_table=np.stack([np.pad(own, (0, width - len(own))) for own in self.tables]),
            sources=np.arange(num_seqs) if number else np.full(num_seqs, -1),
            token_ids=np.array(self.first_ids) if number == 0 else np.full(num_seqs, 311),
            draws=draws,
        )


def _engine() -> TorchEngine:
    return TorchEngine(
        build_decoder(CONFIG, random_weights(CONFIG).items(), torch.float32),
        model_name="tiny",
        identity="tiny",
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
    )


def test_padded_sizes_are_few() -> None:
    assert sorted({padded_size(n, 50) for n in range(1, 51)}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 50]
    assert all(padded_size(n, 50) >= n for n in range(1, 51))
    assert padded_size(3, 3) == 3


@pytest.mark.parametrize("lengths", [[5], [1, 7, 12], [9, 3, 4, 21, 2]], ids=str)
def test_greedy_tokens_equal_the_plain_loop(lengths: list[int], decoder: DeviceDecoder, pool: DevicePool) -> None:
    prompted = Prompted(pool, lengths)
    strangers = sorted(set(range(NUM_BLOCKS)).difference(*(table.tolist() for table in prompted.tables)))
    pool.numbers[strangers] = 7.0
    seqs = prompted.decodings()
    assert decode(GraphStep(decoder, pool, 8), seqs) == NUM_NEW - 1
    assert [seq.output_ids for seq in seqs] == prompted.tokens
    assert bool((pool.numbers[strangers] == 7.0).all())  # rows that pad a step store nothing


def test_sequences_that_end_earlier_leave_and_rows_move_up(decoder: DeviceDecoder, pool: DevicePool) -> None:
    prompted = Prompted(pool, [5, 11, 2, 8, 6])
    counts = [8, 1, 5, 0, 3]
    seqs = prompted.decodings(counts)
    step = GraphStep(decoder, pool, 8)
    assert decode(step, seqs) == 8
    assert [seq.output_ids for seq in seqs] == [t[:n] for t, n in zip(prompted.tokens, counts, strict=True)]
    assert step.num_graphs == (3 if DEVICE.type == "cuda" else 0)  # sizes 4, 2 and 1


def test_stop_id_is_noticed_one_step_late_and_its_extra_id_dropped(decoder: DeviceDecoder, pool: DevicePool) -> None:
    prompted = Prompted(pool, [5, 11])
    first, second = prompted.decodings()
    stop = prompted.tokens[0][3]
    first.stop_ids = frozenset((stop,))
    decode(GraphStep(decoder, pool, 2), [first, second])
    end = prompted.tokens[0].index(stop) + 1
    assert first.output_ids == prompted.tokens[0][:end]
    assert first.num_launched == end + 1
    assert second.output_ids == prompted.tokens[1]


def test_next_step_is_launched_before_ids_are_read(
    decoder: DeviceDecoder, pool: DevicePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []

    class Watched(GraphStep):
        def launch(self, batch: DecodeBatch) -> Ids:
            events.append(("launch", self._num_launched))
            return super().launch(batch)

        def read(self, number: int, num_seqs: int) -> Ints:
            events.append(("read", number))
            return super().read(number, num_seqs)

    decode(Watched(decoder, pool, 2), Prompted(pool, [5]).decodings([3]))
    assert events == [("launch", 0), ("launch", 1), ("read", 0), ("launch", 2), ("read", 1), ("read", 2)]


def test_host_gives_no_id_but_the_first(decoder: DeviceDecoder, pool: DevicePool) -> None:
    """Wrong ids from the host change nothing where a row takes what the step before drew."""
    prompted = Prompted(pool, [5])
    step = GraphStep(decoder, pool, 2)
    found = [int(step.launch(prompted.batch(number)).wait()[0]) for number in range(4)]
    assert found == prompted.tokens[0][:4]


class Recorded(GraphStep):
    """Captures anywhere: what a graph would replay is the same call with the same views of the buffers."""

    def __init__(self, decoder: DeviceDecoder, pool: DevicePool, max_seqs: int) -> None:
        super().__init__(decoder, pool, max_seqs)
        self.captures, self.replayed = True, 0

    def _capture(self, size: int, draws: bool, plan: DevicePlan) -> Callable[[], None]:
        def replay() -> None:
            self.replayed += 1
            self._compute(size, draws, plan)

        return replay


def test_replay_of_the_first_step_of_a_size_serves_all_that_follow(decoder: DeviceDecoder, pool: DevicePool) -> None:
    """Contexts grow into blocks that the captured step had not, and rows move up, all through that step's views."""
    prompted = Prompted(pool, [5, 11, 2, 8, 6])
    counts = [8, 1, 5, 6, 7]
    seqs = prompted.decodings(counts)
    step = Recorded(decoder, pool, 8)
    assert decode(step, seqs) == 8
    assert [seq.output_ids for seq in seqs] == [t[:n] for t, n in zip(prompted.tokens, counts, strict=True)]
    assert step.num_graphs == 4  # of 8, 4, 2 and 1 rows
    assert step.replayed == 8 - 4


def test_buffers_never_move(decoder: DeviceDecoder, pool: DevicePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph of one size reads and writes is at the same addresses in every step."""
    seen: list[tuple[int, ...]] = []
    forward = DeviceDecoder.forward

    def watched(self: DeviceDecoder, step, pool: DevicePool) -> torch.Tensor:
        plan = step.plan
        tensors = (step.positions, step.slot_mapping, plan.cu_seqlens_q, plan.context_lens, plan.block_table)
        seen.append((*(t.data_ptr() for t in (*tensors, plan.short_seqs)), plan.block_table.stride(0), plan.num_splits))
        return forward(self, step, pool)

    monkeypatch.setattr(DeviceDecoder, "forward", watched)
    decode(GraphStep(decoder, pool, 4), Prompted(pool, [5, 9, 2]).decodings())
    assert len(set(seen)) == 1


def test_drawn_tokens_equal_the_samplers(decoder: DeviceDecoder, pool: DevicePool) -> None:
    prompted = Prompted(pool, [5, 11, 2], DRAWN)
    step = GraphStep(decoder, pool, 4)
    found = [step.launch(prompted.batch(number, DRAWN)).wait().tolist() for number in range(NUM_NEW - 1)]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == prompted.tokens


@pytest.mark.parametrize("params", [None, DRAWN], ids=["greedy", "drawn"])
def test_triton_kernels_give_the_same_tokens(
    params: SamplingParams | None, decoder: DeviceDecoder, pool: DevicePool
) -> None:
    pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")
    prompted = Prompted(pool, [40, 11, 2], params)
    step = GraphStep(decoder, pool, 4, num_splits=2)
    with triton_everywhere():
        found = [step.launch(prompted.batch(number, params)).wait().tolist() for number in range(3)]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == [tokens[:3] for tokens in prompted.tokens]


def test_logits_without_a_maximum_are_told_a_step_late(decoder: DeviceDecoder, pool: DevicePool) -> None:
    prompted = Prompted(pool, [5, 9])
    pool.numbers[int(prompted.tables[1][0])] = torch.nan
    good, _bad = seqs = prompted.decodings()
    with pytest.raises(InternalError, match=r"row 1 of 2: no logit is finite"):
        decode(GraphStep(decoder, pool, 2), seqs)
    assert good.output_ids == prompted.tokens[0][:1]


GOOD = DecodeBatch(np.array([3, 5]), np.array([[1, 0], [2, 3]]), np.array([-1, -1]), np.array([4, 9]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (replace(GOOD, context_lens=np.array([3, 65])), r"context 3 or 65 is not in \[1, 65\)"),
        (replace(GOOD, context_lens=np.array([0, 5])), "context 0"),
        (replace(GOOD, context_lens=np.array([3, 9])), "a context of 9 tokens in 2 blocks of 4"),
        (replace(GOOD, block_table=np.array([[1, 0], [2, 64]])), r"block id 0 or 64 is not in \[0, 64\)"),
        (replace(GOOD, token_ids=np.array([4, 320])), "token id 4 or 320"),
        (replace(GOOD, sources=np.array([-1, 0])), "a token of row 0, the step before had 0"),
        (replace(GOOD, context_lens=np.array([], dtype=np.int64)), "a step of 0 sequences, it takes 1 to 2"),
    ],
)
def test_batch_that_does_not_fit_is_refused(
    batch: DecodeBatch, message: str, decoder: DeviceDecoder, pool: DevicePool
) -> None:
    with pytest.raises(InternalError, match=message):
        GraphStep(decoder, pool, 2).launch(batch)
    assert not pool.numbers.any()


def test_ids_read_too_late_are_refused(decoder: DeviceDecoder, pool: DevicePool) -> None:
    step = GraphStep(decoder, pool, 2)
    first, second, _third = (step.launch(GOOD) for _ in range(3))
    second.wait()
    with pytest.raises(InternalError, match="ids of step 0 are read after step 2 was launched"):
        first.wait()


def test_step_longer_than_the_network_takes_is_refused(decoder: DeviceDecoder, pool: DevicePool) -> None:
    with pytest.raises(InternalError, match="2 sequences of 65 tokens"):
        GraphStep(decoder, pool, 2, max_context=65)
