"""Where an attempt runs: filter the workers that can, then let the policy choose among them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

from ..core.ids import WorkerKey
from ..core.prefix_hash import BlockHash, hash_key
from ..protocol.messages import pack_ids
from .auto import Auto, Targets
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
from .two_step import TwoStep

LOCAL_AFTER_FAILURES = 2  # in a row: then "auto" stops trying hand-offs
MAX_ANSWER_BLOCKS = 1024  # of one answer, that are hashed
MAX_ANSWERS = 8  # remembered of one request


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
        self, config: RouterConfig, registry: Registry, index_secret: str, chooser: Chooser | None = None
    ) -> None:
        self._config = config
        self.breakers = Breakers(config.breaker_failures, config.breaker_pause_s)
        self.evidence = Evidence(config.canary)
        self._registry = registry
        self._secret = index_secret
        self.model = CostModel()
        self._chooser = chooser or _make_chooser(config, self.model, index_secret)
        self.index = PrefixIndex(config.max_prefix_blocks)

    def place(self, record: RequestRecord, now: float) -> Placement | Refusal:
        """Workers for the next attempt of `record`."""
        able = self._able_to_decode(record)
        if not able:
            return Refusal.NO_WORKER
        roomy = [worker for worker in able if self._has_room(record, worker)]
        if not roomy:
            return Refusal.NO_ROOM
        options = self._options(record, self._trusted(roomy, "decode", now) or roomy, now)
        decode, prefill = self._chooser.choose(options)
        uncached = max(0, options.num_tokens - options.held_tokens.get((prefill or decode).key, 0))
        return Placement(decode, prefill, uncached, forecast(self.model, options, decode, prefill))

    def is_possible(self, record: RequestRecord) -> bool:
        """Some ready worker could take it, once it has room."""
        return bool(self._able_to_decode(record))

    def note_dispatch(self, record: RequestRecord, placement: Placement) -> None:
        """From now on the workers of this placement hold the prompt's blocks, as a guess."""
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
        self.breakers.forget(worker)
        self.evidence.forget(worker)

    def note_arrival(self, record: RequestRecord, decode: WorkerKey) -> None:
        """The prompt's blocks have come to the worker that decodes."""
        worker = self._registry.find(decode)
        if record.hashes and worker is not None:
            self._insert(record.hashes, worker)

    def _insert(self, hashes: list[BlockHash], worker: WorkerRecord, *, is_here: bool = True) -> None:
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

    def _able_to_decode(self, record: RequestRecord) -> list[WorkerRecord]:
        needed = record.max_sequence_tokens
        able = [
            worker
            for worker in self._registry.live()
            if worker.is_ready and worker.can_decode and worker.hello.max_sequence_tokens >= needed
        ]
        if self._needs_handoff(record):
            able = [worker for worker in able if self._able_to_prefill(record, worker)]
        return able

    def _needs_handoff(self, record: RequestRecord) -> bool:
        """It may not prefill where it decodes."""
        return self._config.disaggregate == "always" and not record.needs_local_prefill

    def _has_room(self, record: RequestRecord, decode: WorkerRecord) -> bool:
        """Blocks and a place on the decode worker, and where it must be handed over, a place in a prefill queue."""
        if self._needs_handoff(record) and not self._free_to_prefill(record, decode):
            return False
        # An idle worker takes anything that fits its context, so no request can wait for ever behind an estimate.
        needed = decode.used_blocks + record.blocks(decode.block_size)
        return not decode.attempts or (decode.has_place and needed <= decode.hello.total_blocks)

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
        matches = self.index.matches(self._hashes(record, size) if self._chooser.reads_prefixes else [])
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
            held_tokens={key: covered_tokens(depth, size) for key, depth in matches.expected.items()},
            here_tokens={key: covered_tokens(depth, size) for key, depth in matches.here.items()},
            may_stay=must_stay or self._config.disaggregate != "always",
            must_stay=must_stay,
        )

    def _free_prefills(self, record: RequestRecord, needed: int, now: float) -> list[WorkerRecord]:
        free = [
            worker
            for worker in self._registry.live()
            if worker.can_prefill
            and worker.is_ready
            and worker.has_place
            and worker.hello.max_sequence_tokens >= needed
            and worker.key not in record.avoid
        ]
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
        return [w for w in workers if self.breakers.allows(w.key, leg, now) and not self.evidence.missing(w)]

    def _hashes(self, record: RequestRecord, block_size: int) -> list[BlockHash]:
        """Hashes of the prompt's full rungs, computed once."""
        if record.hashes is None:
            record.hashes, record.hash_block_size = [], block_size
            extend_rung_hashes(record.hashes, self._hash_key(record), record.prompt_bytes, block_size)
        return record.hashes

    def _hash_key(self, record: RequestRecord) -> bytes:
        return hash_key(record.request.cache_salt, self._secret, "router")


def _without(workers: list[WorkerRecord], avoid: tuple[WorkerKey, ...]) -> list[WorkerRecord]:
    """The workers not to avoid, or all when none is left."""
    return [worker for worker in workers if worker.key not in avoid] or workers


def _make_chooser(config: RouterConfig, model: CostModel, seed: str) -> Chooser:
    if config.policy == "auto":
        return Auto(model, Targets(config.target_ttft_s, config.target_tpot_s))
    return TwoStep(config, seed)
