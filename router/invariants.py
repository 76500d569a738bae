"""The books of the router, recounted from scratch."""

from __future__ import annotations

from ..core.ids import WorkerKey
from .config import RouterConfig
from .lifecycle import Lifecycle
from .registry import Registry, WorkerRecord
from .requests import RequestRecord, State
from .timers import Timers


def check_invariants(
    config: RouterConfig, life: Lifecycle, registry: Registry, timers: Timers[str | WorkerKey]
) -> None:
    """Raise AssertionError that names the request or worker whose books do not balance."""
    table, counters = life.table, life.counters
    num_active = len(table.active) - life.num_canaries
    assert life.num_canaries == sum(record.is_canary for record in table.active.values()), "canaries are counted"
    assert counters.accepted == counters.ended + num_active, "accepted requests are ended or active"
    assert len(table.active) <= config.max_active_requests
    table.waiting.check_invariants()
    life.door.check_invariants()
    assert table.waiting_tokens == sum(record.num_prompt_tokens for record in table.waiting), "waiting tokens add up"
    waiting = {record.request_id for record in table.waiting}
    assert waiting == {name for name, record in table.active.items() if record.state is State.WAITING}
    for name, record in table.active.items():
        assert name in timers, f"request {name} has no timer"
        _check_request(record, registry)
    for worker in registry.all():
        _check_worker(worker, life)


def _check_request(record: RequestRecord, registry: Registry) -> None:
    name = record.request_id
    assert record.state is not State.ENDED, f"request {name} is ended and active"
    assert record.open_choices, f"request {name} has nothing left to do"
    assert (record.attempt is not None) == (record.state is not State.WAITING), (
        f"request {name}: attempt and state differ"
    )
    for choice in record.choices:
        assert len(choice.output_ids) <= record.request.params.max_tokens, f"request {name}: too many tokens"
    if record.attempt is None:
        return
    decode = registry.find(record.attempt.decode)
    assert decode is not None, f"request {name} runs on an incarnation that is gone"
    assert decode.is_live, f"request {name} runs on a lost worker"
    assert record.attempt.key in decode.attempts, f"request {name} is not in the books of {decode.key}"
    assert record.attempt.blocks == record.blocks(decode.block_size), f"request {name}: blocks"
    assert record.state is not State.RUNNING or record.attempt.queued_tokens == 0, f"request {name}: queued tokens"


def _check_worker(worker: WorkerRecord, life: Lifecycle) -> None:
    mine = [r.attempt for r in life.table.active.values() if r.attempt and worker.key in r.attempt.workers]
    expected = {a.key for a in mine if worker.key == a.decode or not a.is_prefill_over}
    assert set(worker.attempts) == expected, f"worker {worker.key}: attempts"
    decoding, others = [a for a in mine if a.decode == worker.key], worker.others
    blocks = others.blocks + sum(a.blocks for a in decoding)
    assert worker.used_blocks == blocks, f"worker {worker.key}: blocks"
    assert worker.num_streams == others.streams + sum(a.streams for a in decoding), f"worker {worker.key}: streams"
    running = others.running + sum(a.streams for a in decoding if a.is_running)
    assert worker.num_running == running, f"worker {worker.key}: running streams"
    assert len(worker.prompts) <= len(worker.attempts), f"worker {worker.key}: prompts"
    queued = others.queued_tokens + sum(a.queued_tokens for a in mine if a.queue == worker.key)
    assert worker.queued_tokens == queued, f"worker {worker.key}: queued tokens"
    assert worker.is_live or not worker.attempts, f"worker {worker.key} is {worker.standing.value} and has attempts"
