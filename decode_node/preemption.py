"""A running sequence gives its blocks up, and has them again later.

    leave        blocks → parked, or nothing but the tokens; then the blocks are freed
    come_back    admission has given blocks for all tokens, the first ones from the prefix cache; parked ones follow
    drop         the sequence ends while it is parked

Bytes are copied by the calls themselves, before blocks are freed and before the sequence is scheduled.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.parking import ParkingSpace, SeqName
from ..engine.sequence import Sequence, blocks_for
from ..protocol.messages import Phases
from ..worker.admission import publish_computed, release
from .preempt_cost import PreemptCost


class Preemption:
    """Without `parking` everything is computed again."""

    def __init__(self, pool: BlockPool, parking: ParkingSpace | None = None) -> None:
        self._pool, self._parking = pool, parking
        self.cost = PreemptCost()
        self.num_preempted = 0
        self.num_parked = 0
        self.num_unparked = 0

    @property
    def parked_bytes(self) -> int:
        return self._parking.parked_bytes if self._parking is not None else 0

    @property
    def num_corrupt(self) -> int:
        return self._parking.num_corrupt if self._parking is not None else 0

    # ---- a sequence ----

    def leave(self, seq: Sequence, now: float) -> None:
        """Free the blocks of `seq`, parked first where that is cheaper than computing them again."""
        self.num_preempted += 1
        if self._parking is not None and self._is_worth_parking(seq, self._parking, now):
            self._park(seq, self._parking)
        release(seq, self._pool)

    def come_back(self, seq: Sequence) -> None:
        """Fill the blocks of `seq` that the prefix cache did not have from what is parked of it."""
        if self._parking is None or not seq.num_parked_tokens:
            return
        size = self._pool.block_size
        held = seq.num_computed_tokens // size
        missing = seq.block_table[held : blocks_for(seq.num_parked_tokens, size)]
        num_right = self._parking.unpark(_name(seq), held, missing)
        restored = min(seq.num_parked_tokens, (held + num_right) * size)
        seq.num_computed_tokens = max(seq.num_computed_tokens, restored)
        seq.num_parked_tokens = 0
        self.num_unparked += 1
        publish_computed(seq, self._pool)

    def drop(self, seq: Sequence) -> None:
        """`seq` will not run again."""
        if self._parking is not None and seq.num_parked_tokens:
            self._parking.free(_name(seq))
            seq.num_parked_tokens = 0

    def _is_worth_parking(self, seq: Sequence, parking: ParkingSpace, now: float) -> bool:
        # Leading blocks that others hold too will most likely still be here: they come back for nothing either way.
        size, num_blocks = self._pool.block_size, blocks_for(seq.num_computed_tokens, self._pool.block_size)
        num_shared = 0
        while num_shared < num_blocks and self._pool.ref_count(seq.block_table[num_shared]) > 1:
            num_shared += 1
        num_moves = num_blocks + num_blocks - num_shared
        num_lost = seq.num_computed_tokens - num_shared * size
        return self.cost.prefers_parking(num_moves * parking.block_bytes, num_lost, now)

    def _park(self, seq: Sequence, parking: ParkingSpace) -> None:
        blocks = seq.block_table[: blocks_for(seq.num_computed_tokens, self._pool.block_size)]
        if parking.park(_name(seq), blocks):
            seq.num_parked_tokens = seq.num_computed_tokens
            self.num_parked += 1

    # ---- measuring ----

    def note_step(self, entries: Iterable[ScheduledSeq], seconds: float, now: float) -> None:
        """A step with these entries took so long, what was copied before it included."""
        if self._parking is None:
            return
        copied = self._parking.take_copied()
        self.cost.copying.note(copied.nbytes, copied.seconds, now)
        sizes = [entry.num_new_tokens for entry in entries]
        num_tokens, in_chunks = sum(sizes), sum(size for size in sizes if size > 1)
        if 2 * in_chunks > num_tokens:
            self.cost.prefill.note(num_tokens, seconds - copied.seconds, now)

    def note_handoff(self, num_tokens: int, phases: Phases, now: float) -> None:
        """A prefill worker has computed a prompt of so many tokens."""
        self.cost.prefill_elsewhere.note(num_tokens - phases.cached_tokens, phases.prefill_s, now)

    def check_invariants(self, waiting: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the parked blocks are those of the waiting sequences, each once."""
        size = self._pool.block_size
        parked = {_name(s): blocks_for(s.num_parked_tokens, size) for s in waiting if s.num_parked_tokens}
        stray = [s.key for s in others if s.num_parked_tokens]
        assert not stray, f"sequences {stray} run and are parked"
        if self._parking is None:
            assert not parked, f"sequences {list(parked)} are parked nowhere"
            return
        self._parking.check_invariants(parked)
        expected = sum(parked.values()) * self._parking.block_bytes
        assert self._parking.parked_bytes == expected, f"{self._parking.parked_bytes} bytes parked, not {expected}"


def _name(seq: Sequence) -> SeqName:
    return SeqName(seq.key, seq.choice)
