"""Where an attempt runs: filter the workers that can, score them, let the policy pick. First decode, then prefill."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..core.ids import WorkerKey
from ..core.prefix_hash import BlockHash, block_hashes, extend_block_hashes, hash_key
from .config import RouterConfig
from .policies import Candidate, Policy, make_policy
from .prefix_index import PrefixIndex
from .registry import Registry, WorkerRecord
from .requests import Choice, RequestRecord

LOCAL_AFTER_FAILURES = 2  # in a row: then "auto" stops trying hand-offs
MAX_ANSWER_BLOCKS = 1024  # hashed of one answer
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


class Placer:
    """Looks at the registry and changes nothing in it; remembers whose turn it is and which prompts went where."""

    def __init__(self, config: RouterConfig, registry: Registry, index_secret: str) -> None:
        self._config = config
        self._registry = registry
        self._secret = index_secret
        self._decode_policy = make_policy(config)
        self._prefill_policy = make_policy(config)
        self.index = PrefixIndex(config.max_prefix_blocks)

    def place(self, record: RequestRecord) -> Placement | Refusal:
        """Workers for the next attempt of `record`."""
        able = self._able_to_decode(record)
        if not able:
            return Refusal.NO_WORKER
        roomy = [worker for worker in able if self._has_room(record, worker)]
        if not roomy:
            return Refusal.NO_ROOM
        matched = self.index.match(self._hashes(record, roomy[0].block_size))
        decode = _pick(self._decode_policy, _without(roomy, record.avoid), matched)
        prefill = self._pick_prefill(record, decode, matched)
        held = matched.get((prefill or decode).key, 0) * decode.block_size
        return Placement(decode, prefill, max(0, record.prefill_tokens() - held))

    def is_possible(self, record: RequestRecord) -> bool:
        """Some ready worker could take it, once it has room."""
        return bool(self._able_to_decode(record))

    def note_dispatch(self, record: RequestRecord, placement: Placement) -> None:
        """From now on the workers of this placement hold the prompt's blocks, as a guess."""
        for worker in (placement.decode, placement.prefill):
            if worker is not None and record.hashes:
                self.index.insert(record.hashes, worker.key)

    def note_answer(self, record: RequestRecord, choice: Choice, num_output_tokens: int, decode: WorkerKey) -> None:
        """From now on `decode` holds the blocks of the prompt and of so much of this answer, as a guess: the next turn
        of a conversation begins with them.
        """
        if record.hashes is None or choice.number >= MAX_ANSWERS:
            return
        hashes, size = list(record.hashes), record.hash_block_size
        num_tokens = min(record.num_prompt_tokens + num_output_tokens, (len(hashes) + MAX_ANSWER_BLOCKS) * size)
        token_ids = (record.request.prompt_ids + choice.output_ids)[:num_tokens]
        extend_block_hashes(hashes, self._hash_key(record), token_ids, size)
        self.index.insert(hashes, decode)

    def has_pair(self) -> bool:
        """Some ready decode worker is linked to some ready prefill worker."""
        return any(
            self._linked_prefill(decode) for decode in self._registry.live() if decode.is_ready and decode.can_decode
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
        return [worker for worker in self._linked_prefill(decode) if worker.hello.max_sequence_tokens >= needed]

    def _free_to_prefill(self, record: RequestRecord, decode: WorkerRecord) -> list[WorkerRecord]:
        return [worker for worker in self._able_to_prefill(record, decode) if worker.has_place]

    def _linked_prefill(self, decode: WorkerRecord) -> list[WorkerRecord]:
        found = (self._registry.find(key) for key in sorted(decode.linked))
        return [
            worker for worker in found if worker and worker.is_ready and worker.can_prefill and worker is not decode
        ]

    def _pick_prefill(
        self, record: RequestRecord, decode: WorkerRecord, matched: dict[WorkerKey, int]
    ) -> WorkerRecord | None:
        if self._prefers_local(record, decode, matched):
            return None
        free = _without(self._free_to_prefill(record, decode), record.avoid)
        survivors = [worker for worker in free if worker.key == record.prefilled_by]
        return _pick(self._prefill_policy, survivors or free, matched) if free else None

    def _prefers_local(self, record: RequestRecord, decode: WorkerRecord, matched: dict[WorkerKey, int]) -> bool:
        mode = self._config.disaggregate
        if mode == "never" or record.needs_local_prefill:
            return True
        if mode == "always":
            return False
        if decode.hello.role == "both" or record.fruitless >= LOCAL_AFTER_FAILURES:
            return True
        uncached = record.prefill_tokens() - matched.get(decode.key, 0) * decode.block_size
        return uncached <= self._config.local_prefill_max_tokens

    def _hashes(self, record: RequestRecord, block_size: int) -> list[BlockHash]:
        """Hashes of the prompt's full blocks, computed once; none where nothing would read them."""
        if self._config.policy != "prefix-affinity" and not self._config.local_prefill_max_tokens:
            return []
        if record.hashes is None:
            record.hashes = block_hashes(self._hash_key(record), record.request.prompt_ids, block_size)
            record.hash_block_size = block_size
        return record.hashes

    def _hash_key(self, record: RequestRecord) -> bytes:
        return hash_key(record.request.cache_salt, self._secret, "router")


def _without(workers: list[WorkerRecord], avoid: tuple[WorkerKey, ...]) -> list[WorkerRecord]:
    """The workers not to avoid, or all when none is left."""
    return [worker for worker in workers if worker.key not in avoid] or workers


def _pick(policy: Policy, workers: list[WorkerRecord], matched: dict[WorkerKey, int]) -> WorkerRecord:
    by_key = {worker.key: worker for worker in workers}
    return by_key[policy.pick([_candidate(worker, matched) for worker in workers]).worker]


def _candidate(worker: WorkerRecord, matched: dict[WorkerKey, int]) -> Candidate:
    load = worker.load
    return Candidate(
        worker.key,
        cost_tokens=worker.queued_tokens + worker.used_blocks * worker.block_size,
        reported=load.running + load.waiting + load.receiving + load.handing_off,
        matched_tokens=matched.get(worker.key, 0) * worker.block_size,
    )
