"""Layers that leave while the chunk which fills them is still being computed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from penstock.core.ids import BlockId, SeededIds, WorkerKey, new_ticket
from penstock.kvtransfer.effects import SendBlocks, SendMessage, SourceEffect
from penstock.kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from penstock.protocol.messages import Done, Grant, Phases

DECODE = WorkerKey("decode-0", "d" * 16)
TICKET = new_ticket(SeededIds(4))
NUM_LAYERS = 6
Piece = tuple[tuple[int, ...], int, int]  # ordinals, first layer, number of layers


@dataclass
class Bench:
    """One hand-off whose chunks are computed layer by layer."""

    num_blocks: int
    sizes: PushSizes
    blocks: list[BlockId] = field(default_factory=list)
    effects: list[SourceEffect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = self.blocks or [BlockId(20 + n) for n in range(self.num_blocks)]
        self.table = SourceTable(9.0, 9.0, self.sizes)
        self.table.open(TICKET, DECODE, HandoffPlan(4 * self.num_blocks, self.num_blocks, 4, self.num_blocks), 0.0)

    def take(self, effects: list[SourceEffect]) -> list[Piece]:
        self.effects += effects
        self.table.check_invariants()
        pushes = [effect for effect in effects if isinstance(effect, SendBlocks)]
        for push in pushes:
            assert push.block_ids == tuple(self.blocks[ordinal] for ordinal in push.ordinals)
        return [(push.ordinals, push.first_layer, push.num_layers) for push in pushes]

    def grant(self, stop: int, held: int = 0) -> list[Piece]:
        return self.take(self.table.on_message(DECODE, Grant(TICKET, 1, held, stop), 0.0))

    def layers(self, stop: int, num_layers: int) -> list[Piece]:
        """Within the step that fills the blocks below `stop`."""
        return self.take(self.table.layers_computed(TICKET, self.blocks[:stop], num_layers, 0.0))

    def ready(self, stop: int) -> list[Piece]:
        if stop == self.num_blocks:
            return self.take(self.table.seal(TICKET, self.blocks, (), Phases(), 0.0))
        return self.take(self.table.blocks_ready(TICKET, self.blocks[:stop], 0.0))

    @property
    def dones(self) -> list[Done]:
        messages = [effect.message for effect in self.effects if isinstance(effect, SendMessage)]
        return [message for message in messages if isinstance(message, Done)]


def test_sizes_are_whole_layers_and_at_least_one() -> None:
    assert PushSizes.of(30, 1 << 16, most_bytes=4 << 20, least_bytes=1 << 20) == PushSizes(30, 64, 16)
    assert PushSizes.of(30, 3 << 19, most_bytes=4 << 20, least_bytes=1 << 20) == PushSizes(30, 2, 1)
    assert PushSizes.of(30, 8 << 20, most_bytes=4 << 20, least_bytes=1 << 20) == PushSizes(30, 1, 1)
    assert PushSizes.of(30, 1000, most_bytes=4000, least_bytes=1001) == PushSizes(30, 4, 2)


def test_layers_leave_as_soon_as_enough_of_them_come_together() -> None:
    bench = Bench(8, PushSizes(NUM_LAYERS, most=1000, least=8))
    bench.grant(8)
    assert bench.layers(4, 1) == []
    assert bench.layers(4, 2) == [((0, 1, 2, 3), 0, 2)]
    assert bench.layers(4, 3) == []
    assert bench.layers(4, 4) == [((0, 1, 2, 3), 2, 2)]
    assert bench.layers(4, 5) == []
    assert bench.layers(4, 6) == [((0, 1, 2, 3), 4, 2)]
    assert bench.ready(4) == []
    assert bench.layers(8, 2) == [((4, 5, 6, 7), 0, 2)]
    assert bench.dones == []
    assert bench.ready(8) == [((4, 5, 6, 7), 2, 4)]
    assert len(bench.dones) == 1


def test_last_layers_leave_within_the_step_however_few_they_are() -> None:
    """Nothing is left to hide them behind: waiting for the end of the step would only add to it."""
    bench = Bench(2, PushSizes(NUM_LAYERS, most=1000, least=8))
    bench.grant(2)
    assert bench.layers(2, 4) == [((0, 1), 0, 4)]
    assert bench.layers(2, 5) == []
    assert bench.layers(2, 6) == [((0, 1), 4, 2)]


def test_too_little_to_hide_goes_in_one_whole_push() -> None:
    bench = Bench(1, PushSizes(NUM_LAYERS, most=1000, least=100))
    bench.grant(1)
    assert [bench.layers(1, layer) for layer in range(1, NUM_LAYERS)] == [[]] * (NUM_LAYERS - 1)
    assert bench.layers(1, NUM_LAYERS) == [((0,), 0, NUM_LAYERS)]
    assert bench.ready(1) == []
    assert len(bench.dones) == 1


def test_grant_within_the_step_lets_the_layers_so_far_leave_together() -> None:
    bench = Bench(4, PushSizes(NUM_LAYERS, most=1000, least=4))
    assert [bench.layers(4, layer) for layer in (1, 2, 3)] == [[], [], []]
    assert bench.grant(3) == []
    assert bench.layers(4, 4) == [((0, 1, 2), 0, 4)]
    assert bench.grant(4) == []  # the rest of the chunk follows when it is done
    assert bench.ready(4) == [((0, 1, 2), 4, 2), ((3,), 0, 6)]


def test_blocks_that_were_not_granted_in_time_go_before_the_layers_of_a_later_chunk() -> None:
    bench = Bench(4, PushSizes(NUM_LAYERS, most=1000, least=1))
    bench.ready(2)
    bench.grant(1)
    assert bench.layers(4, 3) == []  # ordinal 1 is ready and may not leave yet
    assert bench.grant(4) == [((1,), 0, 6)]
    assert bench.layers(4, 4) == [((2, 3), 0, 4)]


def test_held_blocks_do_not_leave_by_layers_either() -> None:
    bench = Bench(4, PushSizes(NUM_LAYERS, most=1000, least=1))
    bench.grant(4, held=2)
    assert bench.layers(3, 2) == [((2,), 0, 2)]
    assert bench.layers(2, 6) == [((2,), 2, 4)]


def test_unknown_ticket_and_an_ended_one_send_nothing() -> None:
    bench = Bench(4, PushSizes(NUM_LAYERS, most=1000, least=1))
    bench.grant(4)
    bench.layers(2, 1)
    bench.table.fail(TICKET, "cancelled", "", 0.0)
    assert bench.layers(2, 2) == []
    assert bench.ready(2) == []
    assert bench.dones == []


@pytest.mark.parametrize("failed_at", [0, 1, 3, NUM_LAYERS])
def test_step_that_fails_and_is_run_again_sends_each_layer_once(failed_at: int) -> None:
    """The second run of a step writes the same bytes and calls no hook: what has left is not sent again."""
    bench = Bench(3, PushSizes(NUM_LAYERS, most=1000, least=1))
    bench.grant(3)
    pieces = [piece for layer in range(1, failed_at + 1) for piece in bench.layers(3, layer)]
    pieces += bench.ready(3)
    assert sorted(layer for _, first, count in pieces for layer in range(first, first + count)) == [*range(NUM_LAYERS)]
    assert all(ordinals == (0, 1, 2) for ordinals, _, _ in pieces)
    assert len(bench.dones) == 1


def test_hook_that_hears_of_fewer_layers_again_sends_nothing_twice() -> None:
    bench = Bench(2, PushSizes(NUM_LAYERS, most=1000, least=1))
    bench.grant(2)
    assert bench.layers(2, 4) == [((0, 1), 0, 4)]
    assert [bench.layers(2, layer) for layer in (1, 2, 3, 4)] == [[], [], [], []]
    assert bench.layers(2, 5) == [((0, 1), 4, 1)]


class History:
    """Chunks, grants and failed steps in any order, on one hand-off.

    What may not leave: a layer twice, a block's layers out of order, anything outside the grant or not computed yet, a
    push above the bound.
    """

    def __init__(self, seed: int, most: int, least: int) -> None:
        self.rng, self.most = random.Random(seed), most
        self.num_blocks = self.rng.randint(1, 10)
        blocks = [BlockId(n) for n in self.rng.sample(range(99), self.num_blocks)]
        self.bench = Bench(self.num_blocks, PushSizes(NUM_LAYERS, most, least), blocks)
        self.sent: Counter[tuple[int, int]] = Counter()
        self.held, self.granted, self.computed = self.rng.randint(0, self.num_blocks), -1, 0
        self.num_early = 0  # pushes that left before their chunk's last layer

    def note(self, pieces: list[Piece], stop: int, num_layers: int) -> None:
        """`stop` blocks are computed below `num_layers`, those before in all."""
        for ordinals, first, count in pieces:
            assert len(ordinals) * count <= self.most
            assert all(self.held <= ordinal < min(self.granted, stop) for ordinal in ordinals)
            assert first + count <= (num_layers if max(ordinals) >= self.computed else NUM_LAYERS)
            for ordinal in ordinals:
                assert all(self.sent[ordinal, layer] == 1 for layer in range(first))
                self.sent.update((ordinal, layer) for layer in range(first, first + count))

    def maybe_grant(self, stop: int, num_layers: int) -> None:
        if self.granted < self.num_blocks and self.rng.random() < 0.4:
            self.grant(self.rng.randint(max(self.granted, self.held), self.num_blocks), stop, num_layers)

    def grant(self, granted: int, stop: int, num_layers: int) -> None:
        self.granted = granted
        self.note(self.bench.grant(granted, self.held), stop, num_layers)

    def step(self) -> None:
        """One chunk; at some layer the step may fail, and is then run again without telling of layers."""
        stop = self.rng.randint(self.computed, self.num_blocks)
        fails_at = self.rng.choice([None, self.rng.randint(0, NUM_LAYERS)])
        self.maybe_grant(self.computed, 0)
        for layer in range(1, NUM_LAYERS + 1):
            if layer == fails_at:
                break
            self.maybe_grant(stop, layer)
            pieces = self.bench.layers(stop, layer)
            self.num_early += len(pieces) if layer < NUM_LAYERS else 0
            self.note(pieces, stop, layer)
        if stop > self.computed:
            self.note(self.bench.ready(stop), stop, NUM_LAYERS)
            self.computed = stop

    def run(self) -> None:
        while self.computed < self.num_blocks:
            self.step()
        self.grant(self.num_blocks, self.num_blocks, NUM_LAYERS)


@pytest.mark.parametrize("most", [1, 2, 4, 7, 1000])
@pytest.mark.parametrize("least", [1, 3, 12, 1000])
def test_every_layer_of_every_block_leaves_once_and_in_order_over_random_histories(most: int, least: int) -> None:
    num_early = 0
    for seed in range(60):
        history = History(seed, most, least)
        history.run()
        wanted = range(history.held, history.num_blocks)
        assert history.sent == Counter((ordinal, layer) for ordinal in wanted for layer in range(NUM_LAYERS)), seed
        assert [done.num_blocks for done in history.bench.dones] == [len(wanted)]
        last = history.bench.effects[-1]
        assert isinstance(last, SendMessage)
        assert isinstance(last.message, Done)
        num_early += history.num_early
    assert (num_early > 0) == (least < 1000)
