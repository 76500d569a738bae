"""What the fitted model says of a request at the door: when its first token would come, behind all that waits.

    wait      the later of two moments: when the workers that compute prompts have worked off what is before it, spread
              over them as evenly as it can be; and when decode workers have room for what is before it and for itself
    prefill   where most of its prompt is cached
    transfer  of the whole prompt, where prompts are handed over

What has been sent to the workers is before it, and so is what the fair queue would serve sooner. What comes later may
overtake it and is not foreseen: `Accuracy` learns by how much waits have been longer than that.
"""

from __future__ import annotations

from typing import NamedTuple

from .placement import Placer
from .registry import WorkerRecord
from .request_table import RequestTable
from .requests import RequestRecord

KEEP = 0.95  # of what was learned, with each first token
LOW, HIGH = 0.5, 4.0
NUM_ERRORS = 1.5  # mean errors that a request is given on top: targets are kept by each, not on average


class Outlook(NamedTuple):
    """Seconds from now."""

    wait_s: float
    prefill_s: float
    transfer_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prefill_s + self.transfer_s


class Accuracy:
    """How measured times to the first token compare with foreseen ones, of late. Long waits weigh more than short."""

    def __init__(self) -> None:
        self._foreseen_s = self._measured_s = 1e-3
        self._error_s = 0.0

    def learn(self, foreseen_s: float, measured_s: float) -> None:
        error_s = abs(measured_s - foreseen_s * self.ratio)
        self._error_s = KEEP * self._error_s + (1.0 - KEEP) * error_s
        self._foreseen_s = KEEP * self._foreseen_s + foreseen_s
        self._measured_s = KEEP * self._measured_s + measured_s

    @property
    def ratio(self) -> float:
        return min(HIGH, max(LOW, self._measured_s / self._foreseen_s))

    def most_s(self, foreseen_s: float) -> float:
        """Most requests have their first token by then."""
        return foreseen_s * self.ratio + NUM_ERRORS * self._error_s


def look_out(placer: Placer, table: RequestTable, record: RequestRecord, now: float) -> Outlook:
    """For a request that is not queued yet. `record.prefill_s` of those before it must be filled in."""
    ahead = list(table.ahead(record))
    computing = placer.computing()
    waits = [worker.prompts.wait_s(now) for worker in computing]
    prompts_s = even_level(waits, sum(other.prefill_s for other in ahead))
    room_s = _until_room(placer, record, ahead)
    transfer_s = 0.0
    if computing and not computing[0].can_decode:
        source = computing[0]
        num_bytes = record.num_prompt_tokens * source.hello.bytes_per_token
        transfer_s = placer.model.transfer_s(source.key, source.key, num_bytes)
    return Outlook(max(prompts_s, room_s), record.prefill_s, transfer_s)


def even_level(waits: list[float], seconds: float) -> float:
    """When the first of several workers is free again, once `seconds` of work have been given to whoever is freest."""
    if not waits:
        return 0.0
    ordered = sorted(waits)
    filled = 0.0
    for count, wait in enumerate(ordered, start=1):
        filled += wait
        level = (filled + seconds) / count
        if count == len(ordered) or level <= ordered[count]:
            return level
    raise AssertionError("the last worker takes whatever is left")


def _until_room(placer: Placer, record: RequestRecord, ahead: list[RequestRecord]) -> float:
    """Until decode workers have blocks for all of these, and streams that keep their pace."""
    decodes = placer.able_to_decode(record)
    if not decodes:
        return 0.0
    size = decodes[0].block_size
    blocks = sum(other.blocks(size) for other in ahead) + record.blocks(size)
    free = sum(max(0, worker.hello.total_blocks - worker.used_blocks) for worker in decodes)
    wait_s = _until(blocks - free, [(worker.used_blocks, _life_s(placer, worker)) for worker in decodes])
    tpot_s = placer.streams.tpot_s(record)
    if tpot_s is not None:
        streams = sum(other.request.params.n for other in ahead) + record.request.params.n
        room = sum(max(0.0, placer.streams.room(record, worker, tpot_s)) for worker in decodes)
        leaving = [(worker.num_streams, _life_s(placer, worker)) for worker in decodes]
        wait_s = max(wait_s, _until(streams - room, leaving))
    return wait_s


def _until(missing: float, leaving: list[tuple[int, float]]) -> float:
    """Until `missing` have been given back, where each pair says how many are held and for how long."""
    rate = sum(held / life_s for held, life_s in leaving)
    return missing / rate if missing > 0 and rate > 0 else 0.0


def _life_s(placer: Placer, worker: WorkerRecord) -> float:
    """How long a stream stays there, as its answer is expected to be."""
    return max(1e-3, placer.model.expected_output_tokens * placer.streams.pace_s(worker))
