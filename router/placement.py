"""Where an attempt runs: filter the workers that can, then let the policy choose among them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

from ..core.ids import WorkerKey
from ..core.prefix_hash import hash_key
from ..protocol.messages import pack_ids
from .auto import Auto, Targets
from .block_watch import BlockWatch
from .breaker import Breakers, Leg
from .config import RouterConfig
from .cost_model import CostModel
from .evidence import Evidence
from .forecast import Forecast, forecast
from .options import Chooser, Options
from .prefix_index import PrefixIndex
from .prefix_ladder import covered_tokens, extend_rung_hashes, rung_sizes
from .registry import Registry, WorkerRecord
from .requests import Choice, RequestRecord
from .rung_hash import RungHash
from .stream_limit import StreamLimit
from .two_step import TwoStep

LOCAL_AFTER_FAILURES = 2  # in a row: then "auto" stops trying hand-offs
MAX_ANSWER_BLOCKS = 1024  # of one answer, that are hashed
MAX_ANSWERS = 8  # remembered of one request
SUPPLY_S = 0.1  # of prompts that a worker has before it; more would only wait there in an order of their own


class Refusal(Enum):
    """Why a request cannot be placed now."""

    NO_ROOM = "every worker that could take it is full"
    NO_WORKER = "no worker could take it even when idle"


@dataclass(frozen=True, slots=True)
class Placement:
    """`uncached_tokens` are left to compute on the worker that prefills, as far as the router can guess."""

    decode: WorkerRecord
    prefill: WorkerRecord | None
    uncached_tokens: int
    forecast: Forecast


class Placer:
    """Looks at the registry and changes nothing in it; remembers whose turn it is and which prompts went where."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        index_secret: str,
        chooser: Chooser | None = None,
        cluster_key: bytes = b"",
    ) -> None:
        self._config = config
        self.breakers = Breakers(config.breaker_failures, config.breaker_pause_s)
        self.evidence = Evidence(config.canary)
        self._registry = registry
        self._secret = index_secret
        self.model = CostModel()
        self.streams = StreamLimit(self.model)
        self._chooser = chooser or _make_chooser(config, self.model, index_secret)
        self.index = PrefixIndex(config.max_prefix_blocks)
        self.blocks = BlockWatch(config.max_exact_blocks, cluster_key)

    def place(self, record: RequestRecord, now: float) -> Placement | Refusal:
        """Workers for the next attempt of `record`."""
        able = self.able_to_decode(record)
        if not able:
            return Refusal.NO_WORKER
        roomy = self._roomy(record, able)
        if not roomy:
            return Refusal.NO_ROOM
        options = self._options(record, self._trusted(roomy, "decode", now) or roomy, now)
        decode, prefill = self._chooser.choose(options)
        uncached = max(0, options.num_tokens - options.held_tokens.get((prefill or decode).key, 0))
        num_beside = self._registry.neighbours_at_work(prefill or decode)
        return Placement(decode, prefill, uncached, forecast(self.model, options, decode, prefill, num_beside))

    def is_possible(self, record: RequestRecord) -> bool:
        """Some ready worker could take it, once it has room."""
        return bool(self.able_to_decode(record))

    def computing(self) -> list[WorkerRecord]:
        """The workers that compute prompts: those for prefill where there are any, else those that decode."""
        ready = [worker for worker in self._registry.live() if worker.is_ready]
        able = [worker for worker in ready if worker.can_prefill] if self._config.disaggregate != "never" else []
        return able or [worker for worker in ready if worker.can_decode]

    def is_supplied(self, record: RequestRecord, now: float) -> bool:
        """Each of them has enough to do for now, those prompts not counted that are handed over meanwhile."""
        workers = self.computing()
        return bool(workers) and all(self._has_supply(record, worker, now) for worker in workers)

    def _has_supply(self, record: RequestRecord, worker: WorkerRecord, now: float) -> bool:
        if len(worker.prompts) < 2:
            return False
        supply_s = SUPPLY_S
        if not worker.can_decode:
            num_bytes = record.num_prompt_tokens * worker.hello.bytes_per_token
            supply_s += self.model.transfer_s(worker.key, worker.key, num_bytes)
        return worker.prompts.wait_s(now) > supply_s

    def least_prefill_s(self, record: RequestRecord) -> float:
        """Where it takes least time, apart from waiting."""
        workers = self.computing()
        if not workers:
            return 0.0
        num_tokens, size = record.num_prompt_tokens, workers[0].block_size
        held = self.index.matches(self.hash_prompt(record, size) if self._chooser.reads_prefixes else []).here
        here = {key: min(covered_tokens(depth, size), num_tokens - 1) for key, depth in held.items()}
        cached = [(worker, here.get(worker.key, 0)) for worker in workers]
        return min(
            self.model.prefill_s(worker.key, num_tokens - count, count, worker.num_running) for worker, count in cached
        )

    def note_dispatch(self, record: RequestRecord, placement: Placement) -> None:
        """From now on the workers of this placement hold the prompt's blocks, as a guess."""
        self.blocks.note_sent(record, placement.decode, placement.prefill)
        if not record.hashes:
            return
        # Prompts are computed in turn, so what is sent to the same worker later finds these blocks. What decode is to
        # receive is there only after the hand-off.
        self._insert(record.hashes, placement.decode, is_here=placement.prefill is None)
        if placement.prefill is not None:
            self._insert(record.hashes, placement.prefill)

    def forget(self, worker: WorkerKey) -> None:
        """This incarnation is gone: it holds nothing and nothing is held against it."""
        self.index.forget(worker)
        self.blocks.forget(worker)
        self.breakers.forget(worker)
        self.evidence.forget(worker)

    def note_arrival(self, record: RequestRecord, decode: WorkerKey) -> None:
        """The prompt's blocks have come to the worker that decodes."""
        worker = self._registry.find(decode)
        if record.hashes and worker is not None:
            self._insert(record.hashes, worker)

    def _insert(self, hashes: list[RungHash], worker: WorkerRecord, *, is_here: bool = True) -> None:
        size = worker.block_size
        capacity = max(0, worker.hello.total_blocks - worker.used_blocks) * size
        sizes = rung_sizes(len(hashes), size)
        self.index.insert(hashes, worker.key, is_here=is_here, sizes=sizes, capacity=capacity)

    def note_answer(self, record: RequestRecord, choice: Choice, num_output_tokens: int, decode: WorkerKey) -> None:
        """From now on `decode` holds the blocks of the prompt and of so much of this answer, as a guess: the next turn
        of a conversation begins with them.
        """
        if record.hashes is None or choice.number >= MAX_ANSWERS:
            return
        hashes, size = list(record.hashes), record.hash_block_size
        num_tokens = min(
            num_output_tokens, MAX_ANSWER_BLOCKS * size + covered_tokens(len(hashes), size) - record.num_prompt_tokens
        )
        ids = record.prompt_bytes + pack_ids(choice.output_ids[: max(0, num_tokens)])
        extend_rung_hashes(hashes, self._hash_key(record), ids, size)
        worker = self._registry.find(decode)
        if worker is not None:
            self._insert(hashes, worker)

    def has_pair(self) -> bool:
        """Some ready decode worker is linked to some ready prefill worker."""
        return any(
            self.linked_prefill(decode) for decode in self._registry.live() if decode.is_ready and decode.can_decode
        )

    def able_to_decode(self, record: RequestRecord) -> list[WorkerRecord]:
        needed = record.max_sequence_tokens
        able = [
            worker
            for worker in self._registry.ready()
            if (hello := worker.hello).role != "prefill" and hello.max_sequence_tokens >= needed
        ]
        if self._needs_handoff(record):
            able = [worker for worker in able if self._able_to_prefill(record, worker)]
        return able

    def _needs_handoff(self, record: RequestRecord) -> bool:
        """It may not prefill where it decodes."""
        return self._config.disaggregate == "always" and not record.needs_local_prefill

    def _roomy(self, record: RequestRecord, decodes: list[WorkerRecord]) -> list[WorkerRecord]:
        """Those with blocks, a place and time for another stream, and for what must be handed over, a place in some
        prefill queue.
        """
        if self._needs_handoff(record):
            decodes = [worker for worker in decodes if self._free_to_prefill(record, worker)]
        blocks = {size: record.blocks(size) for size in {worker.block_size for worker in decodes}}
        # An idle worker takes anything that fits its context, so no request can wait for ever behind an estimate.
        roomy = [
            worker
            for worker in decodes
            if worker.is_idle
            or (worker.used_blocks + blocks[worker.block_size] <= worker.hello.total_blocks and worker.has_place)
        ]
        tpot_s = None if record.num_output_tokens else self.streams.tpot_s(record)
        if tpot_s is None:
            return roomy
        return [w for w in roomy if w.is_idle or self.streams.room(record, w, tpot_s) >= 1]

    def _able_to_prefill(self, record: RequestRecord, decode: WorkerRecord) -> list[WorkerRecord]:
        needed = record.prefill_tokens()
        return [worker for worker in self.linked_prefill(decode) if worker.hello.max_sequence_tokens >= needed]

    def _free_to_prefill(self, record: RequestRecord, decode: WorkerRecord) -> list[WorkerRecord]:
        return [worker for worker in self._able_to_prefill(record, decode) if worker.has_place]

    def linked_prefill(self, decode: WorkerRecord) -> list[WorkerRecord]:
        found = (self._registry.find(key) for key in sorted(decode.linked))
        return [
            worker for worker in found if worker and worker.is_ready and worker.can_prefill and worker is not decode
        ]

    def _options(self, record: RequestRecord, roomy: list[WorkerRecord], now: float) -> Options:
        size = roomy[0].block_size
        matches = self.index.matches(self.hash_prompt(record, size) if self._chooser.reads_prefixes else [])
        held_tokens = {key: covered_tokens(depth, size) for key, depth in matches.expected.items()}
        here_tokens = {key: covered_tokens(depth, size) for key, depth in matches.here.items()}
        if self.blocks.is_on and self._chooser.reads_prefixes:
            self.blocks.correct(record, self._registry.live(), held_tokens, here_tokens, now)
        needed = record.prefill_tokens()
        must_stay = self._config.disaggregate == "never" or record.needs_local_prefill
        if self._config.disaggregate == "auto" and record.fruitless >= LOCAL_AFTER_FAILURES:
            must_stay = True
        return Options(
            record=record,
            now=now,
            num_tokens=needed,
            decodes=_without(roomy, record.avoid),
            prefills=[] if must_stay else self._free_prefills(record, needed, now),
            prefills_of=partial(self._prefills_of, record, now),
            held_tokens=held_tokens,
            here_tokens=here_tokens,
            may_stay=must_stay or self._config.disaggregate != "always",
            must_stay=must_stay,
        )

    def _free_prefills(self, record: RequestRecord, needed: int, now: float) -> list[WorkerRecord]:
        free = [
            worker
            for worker in self._registry.ready()
            if (hello := worker.hello).role != "decode" and hello.max_sequence_tokens >= needed and worker.has_place
        ]
        if record.avoid:
            free = [worker for worker in free if worker.key not in record.avoid]
        return self._trusted_to_prefill(free, now)

    def _prefills_of(self, record: RequestRecord, now: float, decode: WorkerRecord) -> list[WorkerRecord]:
        """Where it was prefilled before, if that worker lives: it may still hold the blocks."""
        trusted = self._trusted_to_prefill(self._free_to_prefill(record, decode), now)
        free = _without(trusted, record.avoid)
        return [worker for worker in free if worker.key == record.prefilled_by] or free

    def _trusted_to_prefill(self, workers: list[WorkerRecord], now: float) -> list[WorkerRecord]:
        """Where decode may prefill for itself, nobody has to go to one that fails."""
        trusted = self._trusted(workers, "prefill", now)
        return trusted or (workers if self._config.disaggregate == "always" else [])

    def _trusted(self, workers: list[WorkerRecord], leg: Leg, now: float) -> list[WorkerRecord]:
        allowed = self.breakers.allowed(workers, leg, now)
        return [worker for worker in allowed if not self.evidence.missing(worker)] if self.evidence.is_on else allowed

    def hash_prompt(self, record: RequestRecord, block_size: int) -> list[RungHash]:
        """Hashes of the prompt's full rungs, computed once."""
        if record.hashes is None:
            record.hashes, record.hash_block_size = [], block_size
            extend_rung_hashes(record.hashes, self._hash_key(record), record.prompt_bytes, block_size)
        return record.hashes

    def _hash_key(self, record: RequestRecord) -> bytes:
        return hash_key(record.request.cache_salt, self._secret, "router")


def _without(workers: list[WorkerRecord], avoid: tuple[WorkerKey, ...]) -> list[WorkerRecord]:
    """The workers not to avoid, or all when none is left."""
    if not avoid:
        return workers
    return [worker for worker in workers if worker.key not in avoid] or workers


def _make_chooser(config: RouterConfig, model: CostModel, seed: str) -> Chooser:
    if config.policy == "auto":
        return Auto(model, Targets(config.target_ttft_s, config.target_tpot_s))
    return TwoStep(config, seed)
