"""Follows what workers tell of their caches, and asks anew where something was missed.

Of each worker one watch counts at a time, and its news in order: a gap, or a heartbeat that for a while speaks of news
which have not come, begins the next watch. Until its first news a worker is not followed, and the guess of the prefix
index stands for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.block_names import block_names, name_key, unpack_names
from ..core.ids import WorkerKey
from ..core.prefix_hash import block_hashes
from ..protocol.messages import BlockNews, Fingerprint
from .block_index import BlockIndex
from .registry import WorkerRecord
from .requests import RequestRecord

MAX_SENT = 32  # prompts of one worker that are expected there
SENT_S = 10.0  # so long; then its news must have told of them


@dataclass(slots=True)
class _Followed:
    watch: int
    number: int = 0
    late_since: float | None = None
    sent: deque[tuple[float, Sequence[int]]] = field(default_factory=lambda: deque(maxlen=MAX_SENT))


class BlockWatch:
    """Off with a bound of 0 blocks: then no worker is asked, and nothing is known."""

    def __init__(self, max_blocks: int, cluster_key: bytes) -> None:
        self.is_on = max_blocks > 0
        self.index = BlockIndex(max_blocks)
        self._key = name_key(cluster_key)
        self._followed: dict[WorkerKey, _Followed] = {}
        self._num_watches = 0
        self._asked_at = 0.0

    def begin(self, worker: WorkerKey) -> int:
        """The number of a new watch, to be sent to `worker`."""
        self.forget(worker)
        self._num_watches += 1
        self._followed[worker] = _Followed(self._num_watches)
        return self._num_watches

    def forget(self, worker: WorkerKey) -> None:
        self._followed.pop(worker, None)
        self.index.forget(worker)

    def on_news(self, worker: WorkerKey, news: BlockNews) -> bool:
        """Take the news in. False when some are missing, so that a new watch has to begin."""
        known = self._followed.get(worker)
        if known is None or news.watch != known.watch or news.number <= known.number:
            return True  # of an older watch, or doubled
        if news.number != known.number + 1:
            return False
        known.number, known.late_since = news.number, None
        self.index.store(worker, unpack_names(news.stored))
        self.index.remove(worker, unpack_names(news.removed))
        return True

    def is_late(self, worker: WorkerKey, told: tuple[int, int] | None, now: float, patience_s: float) -> bool:
        """Whether the heartbeat's word of what was told differs for longer than `patience_s` from what has come."""
        known = self._followed.get(worker)
        if known is None or told == (known.watch, known.number):
            if known is not None:
                known.late_since = None
            return False
        known.late_since = now if known.late_since is None else known.late_since
        return now - known.late_since > patience_s

    # ---- what placement asks ----

    def follows(self, worker: WorkerKey) -> bool:
        """Its news have come."""
        known = self._followed.get(worker)
        return known is not None and known.number > 0

    def correct(
        self,
        record: RequestRecord,
        workers: Sequence[WorkerRecord],
        held_tokens: dict[WorkerKey, int],
        here_tokens: dict[WorkerKey, int],
        now: float,
    ) -> None:
        """Put what is known of the workers that are followed in the place of what was guessed of them."""
        self._asked_at = now
        matches: dict[int, dict[WorkerKey, int]] = {}
        for worker in workers:
            if not self.follows(worker.key):
                continue
            names = self._names(record, worker.hello.fingerprint)
            if id(names) not in matches:
                matches[id(names)] = self.index.match(names)
            depth = matches[id(names)].get(worker.key, 0)
            here_tokens[worker.key] = depth * worker.block_size
            held_tokens[worker.key] = max(depth, self._expected(worker.key, names, now)) * worker.block_size

    def _names(self, record: RequestRecord, fingerprint: Fingerprint) -> list[int]:
        """The names of the prompt's full blocks in caches of this format, worked out once. Live workers differ in
        nothing else.
        """
        cache_format = fingerprint.dtype, fingerprint.block_size
        if cache_format not in record.block_names:
            key = fingerprint.cache_key(record.request.cache_salt)
            hashes = block_hashes(key, record.request.prompt_ids, max(1, fingerprint.block_size))
            record.block_names[cache_format] = block_names(self._key, hashes)
        return record.block_names[cache_format]

    def note_sent(self, record: RequestRecord, *workers: WorkerRecord | None) -> None:
        """The prompt goes to these workers: what comes there later will find its blocks."""
        for worker in workers:
            known = self._followed.get(worker.key) if worker is not None else None
            if worker is None or known is None:
                continue
            fingerprint = worker.hello.fingerprint
            names = record.block_names.get((fingerprint.dtype, fingerprint.block_size))
            if names:
                known.sent.append((self._asked_at, names))

    def _expected(self, worker: WorkerKey, names: Sequence[int], now: float) -> int:
        """Leading blocks that prompts sent there lately will leave."""
        sent = self._followed[worker].sent
        return max((_common(names, other) for at, other in sent if now - at < SENT_S), default=0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading names that both have. A name stands for all before it, so the end is found by halving."""
    low, high = 0, min(len(one), len(other)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle)
    return low
