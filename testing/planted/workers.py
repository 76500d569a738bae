"""Bugs of one worker: its blocks, its scheduler, its step, its roles."""

from __future__ import annotations

from typing import Any

import msgspec

from ...core.errors import InternalError
from ...core.ids import AttemptKey
from ...decode_node.preemption import Preemption
from ...decode_node.receiving import Receiving, ReceivingQueue
from ...decode_node.role import DecodeRole
from ...decode_node.scheduler import DecodeScheduler
from ...engine import sequence
from ...engine.block_pool import BlockPool
from ...engine.parking import Parking
from ...prefill_node import role as prefill_role
from ...prefill_node.role import PrefillRole
from ...protocol.messages import Abort
from ...worker.admission import match_blocks, release
from ...worker.core import ROLES_OF, WorkerCore
from ...worker.heartbeat import HeartbeatBuilder
from .bug import Bug, Seeds, plants
from .handoffs import ANY, CALM


def preempted_by(original: Any, then: Any) -> Any:
    """`DecodeScheduler.schedule`, and `then(scheduler, sequence, its blocks before)` for each that it preempts and does
    not park.
    """

    def schedule(self: DecodeScheduler, budget: Any, now: float) -> Any:
        before = [(seq, list(seq.block_table)) for seq in self.running]
        entries = original(self, budget, now)
        for seq, table in before:
            if seq in self.waiting and not seq.num_parked_tokens:
                then(self, seq, table)
        return entries

    return schedule


def lose_preempted(original: Any) -> Any:
    return preempted_by(original, lambda self, seq, table: self.waiting.remove(seq))


def remember_offer(original: Any) -> Any:
    def add_offer(self: Any, offer: Any, lead: Any) -> None:
        self.planted_offers = {**getattr(self, "planted_offers", {}), id(lead): (offer, lead)}
        original(self, offer, lead)

    return add_offer


def ask_again(original: Any) -> Any:
    def then(self: Any, seq: Any, table: Any) -> None:
        offer, lead = getattr(self, "planted_offers", {}).get(id(seq), (None, None))
        if lead is seq:
            self.waiting.remove(seq)
            self.incoming.offers.append(Receiving(offer, seq, offer.reached))

    return preempted_by(original, then)


def one_block_short(original: Any) -> Any:
    def then(self: DecodeScheduler, seq: Any, table: Any) -> None:
        if len(table) > 1 and self._pool.can_allocate(1):
            self._pool.allocate(1)

    return preempted_by(original, then)


def keep_the_seat(original: Any) -> Any:
    def end(self: ReceivingQueue, lead: Any) -> None:
        ending = [item.lead for item in self.receiving if item.is_ending]
        if lead not in ending[:1]:
            original(self, lead)

    return end


def share_for_nothing(original: Any) -> Any:
    def acquire(self: BlockPool, block_ids: Any) -> None:
        original(self, [block for block in block_ids if self.ref_count(block) == 0])

    return acquire


def crash_on_unknown_abort(original: Any) -> Any:
    def on_command(self: DecodeRole, message: Any, now: float, router: str) -> None:
        if isinstance(message, Abort) and AttemptKey(message.request_id, message.attempt, router) not in self.active():
            raise AttributeError("'NoneType' object has no attribute 'abort'")
        original(self, message, now, router)

    return on_command


def leave_the_waiting(original: Any) -> Any:
    def remove(self: DecodeScheduler, seq: Any) -> None:
        was_waiting = seq in self.waiting
        original(self, seq)
        if was_waiting:
            self.waiting.append(seq)

    return remove


def short_hashes(original: Any) -> Any:
    def extend(hashes: Any, *args: Any) -> None:
        before = len(hashes)
        original(hashes, *args)
        hashes[before:] = [block_hash[:1] for block_hash in hashes[before:]]

    return extend


def without_boundary(original: Any) -> Any:
    def compute(self: WorkerCore, batch: Any, on_layers: Any = None) -> Any:
        try:
            return self.engine.execute([entry for _, entry in batch], on_layers)
        except InternalError as error:
            raise RuntimeError(f"the whole step: {error}") from error

    return compute


def look_and_leave(original: Any) -> Any:
    def try_admit(seq: Any, pool: Any, *args: Any, **kwargs: Any) -> Any:
        held = original(seq, pool, *args, **kwargs)
        if held is None:
            pool.acquire(match_blocks(seq, pool, keep_last=True))
        return held

    return try_admit


def abort_by_request(original: Any) -> Any:
    def on_command(self: DecodeRole, message: Any, now: float, router: str) -> None:
        if isinstance(message, Abort):
            for key in self.active():
                if key.request_id == message.request_id:
                    message = msgspec.structs.replace(message, attempt=key.attempt)
        original(self, message, now, router)

    return on_command


def forget_pending(original: Any) -> Any:
    def on_frame(self: HeartbeatBuilder, frame: Any) -> bool:
        is_current = bool(original(self, frame))
        self._pending.clear()
        return is_current

    return on_frame


def key_error_on_abort(original: Any) -> Any:
    def on_command(self: PrefillRole, message: Any, now: float, router: str) -> None:
        if isinstance(message, Abort):
            key = AttemptKey(message.request_id, message.attempt, router)
            if key in self._recent and key not in self._tasks:
                raise KeyError(str(key))
        original(self, message, now, router)

    return on_command


def free_early(original: Any) -> Any:
    def advance(self: PrefillRole, task: Any, entry: Any, tokens: Any, now: float) -> None:
        original(self, task, entry, tokens, now)
        if entry.sample and task.seq.block_table:
            release(task.seq, self._pool)

    return advance


def skip_index(original: Any) -> Any:
    def accept(self: DecodeRole, *args: Any) -> None:
        original(self, *args)
        for items in self._items.values():
            if items and items[-1].index == 2:
                items.pop()

    return accept


def never_too_late(original: Any) -> Any:
    return lambda self, now: None


def park_late(original: Any) -> Any:
    def park(self: Preemption, seq: Any, parking: Any) -> None:
        table, computed, published = list(seq.block_table), seq.num_computed_tokens, seq.num_published_blocks
        release(seq, self._pool)
        seq.block_table, seq.num_computed_tokens = table, computed
        original(self, seq, parking)
        seq.block_table, seq.num_published_blocks = [], published

    return park


def park_unchecked(original: Any) -> Any:
    def copy_back(self: Parking, *args: Any) -> bool:
        original(self, *args)
        return True

    return copy_back


def cut_old_role(original: Any) -> Any:
    def become(self: WorkerCore, name: Any, now: float) -> Any:
        effects = original(self, name, now)
        self.roles = [role for role in self.roles if ("prefill" if role.hands_off else "decode") in ROLES_OF[name]]
        return effects

    return become


WORKER_BUGS = [
    Bug(
        "5",
        "sglang#6857",
        "a preempted sequence counts as done and is never scheduled again",
        plants((DecodeScheduler, "schedule", lose_preempted)),
        Seeds("I1", ANY),
    ),
    Bug(
        "6",
        "sglang#9266, #10110",
        "the first hand-off that is cut short keeps its seat",
        plants((ReceivingQueue, "end", keep_the_seat)),
        Seeds("I8", ANY),
    ),
    Bug(
        "8",
        "sglang#6258, #7256, #7130",
        "a block that a second sequence shares is counted once",
        plants((BlockPool, "acquire", share_for_nothing)),
        Seeds("I4", ANY),
    ),
    Bug(
        "9",
        "sglang#21680",
        "an abort that comes after the end finds nothing and crashes on it",
        plants((DecodeRole, "on_command", crash_on_unknown_abort)),
        Seeds("I9", ANY),
    ),
    Bug(
        "10",
        "sglang#20272",
        "a sequence that is cancelled while it waits goes on as a phantom",
        plants((DecodeScheduler, "remove", leave_the_waiting)),
        Seeds("I12", ANY),
    ),
    Bug(
        "19",
        "vllm#18631, #53250",
        "a sequence preempted after its hand-off asks for the same hand-off again",
        plants((DecodeScheduler, "add_offer", remember_offer), (DecodeScheduler, "schedule", ask_again)),
        Seeds("I1", ANY),
    ),
    Bug(
        "22",
        "vllm#39146, #38606",
        "blocks of different tokens have the same hash, so one request reads another's",
        plants((sequence, "extend_block_hashes", short_hashes)),
        Seeds("I7", CALM),
    ),
    Bug(
        "24",
        "vllm#17313, #17248, #37642",
        "what one request does wrong in a step (there: its grammar) escapes and takes the worker's loop with it",
        plants((WorkerCore, "compute", without_boundary)),
        Seeds("I9", ANY),
    ),
    Bug(
        "25",
        "vllm#44100",
        "the prefix is looked up and held, and kept when the sequence is not admitted after all",
        plants((prefill_role, "try_admit", look_and_leave)),
        Seeds("I4", ANY),
    ),
    Bug(
        "26",
        "vllm#49889",
        "the list of blocks that are given up (there: offloaded) is one shorter than the table",
        plants((DecodeScheduler, "schedule", one_block_short)),
        Seeds("I4", ANY),
    ),
    Bug(
        "29",
        "dynamo#11647",
        "a late free names the request and not the attempt, and takes the next owner's",
        plants((DecodeRole, "on_command", abort_by_request)),
        Seeds("I1", ANY),
    ),
    Bug(
        "35",
        "ray#54070",
        "a worker that is busy does not answer for what has arrived, and is taken for broken",
        plants((HeartbeatBuilder, "on_frame", forget_pending)),
        Seeds("I14", CALM),
    ),
    Bug(
        "36",
        "llm-d#187",
        "an abort after the end looks the request up and raises KeyError",
        plants((PrefillRole, "on_command", key_error_on_abort)),
        Seeds("I9", ANY),
    ),
    Bug(
        "free-early",
        "of our own",
        "blocks go back when they are pushed, not when they are acknowledged",
        plants((PrefillRole, "_advance", free_early)),
        Seeds("I5", ANY),
    ),
    Bug(
        "skip-index",
        "of our own",
        "one token never reaches the stream",
        plants((DecodeRole, "_accept", skip_index)),
        Seeds("I3", CALM),
    ),
    Bug(
        "late-start",
        "of our own",
        "workers compute what nobody waits for any more",
        plants((PrefillRole, "_expire", never_too_late), (DecodeRole, "_expire", never_too_late)),
        Seeds("I12", ANY),
    ),
    Bug(
        "park-late",
        "of our own",
        "blocks are freed before they are copied out",
        plants((Preemption, "_park", park_late)),
        Seeds("I5", ANY),
    ),
    Bug(
        "park-leak",
        "of our own",
        "a sequence that ends while it is parked keeps its host memory",
        plants((Preemption, "drop", lambda original: lambda self, seq: None)),
        Seeds("I4", ANY),
    ),
    Bug(
        "park-unchecked",
        "of our own",
        "what comes back damaged from host memory is used",
        plants((Parking, "_copy_back", park_unchecked)),
        Seeds("I2", ANY),
    ),
    Bug(
        "cut-role",
        "of our own",
        "a worker that is given another role forgets what it does in the old one",
        plants((WorkerCore, "_become", cut_old_role)),
        Seeds("I4", ANY),
    ),
]
