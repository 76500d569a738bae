"""How many streams a worker may carry: it grows while there is time left, shrinks when there is none, and recovers."""

from __future__ import annotations

import pytest

from penstock.core.config import ClassConfig
from penstock.core.ids import WorkerKey
from penstock.protocol.messages import Fingerprint, Hello
from penstock.protocol.sampling import SamplingParams
from penstock.router.classes import Classes
from penstock.router.config import RouterConfig
from penstock.router.cost_model import CostModel
from penstock.router.interface import GenerateRequest
from penstock.router.registry import WorkerRecord
from penstock.router.requests import RequestRecord
from penstock.router.stream_limit import MIN_PACES, StreamLimit

CLASSES = (ClassConfig("chat", target_tpot_s=0.05), ClassConfig("standard"))


def worker(num_streams: int = 0) -> WorkerRecord:
    hello = Hello("decode", 1, Fingerprint("m", "w", "float32", 1, 1, 1, 16, ""), 1000, 10_000, 64, "", ["shm"], 100)
    return WorkerRecord(WorkerKey("d", "0" * 16), hello, 0.0, num_streams=num_streams)


def record(**fields: object) -> RequestRecord:
    request = GenerateRequest("r", [1] * 10, SamplingParams(max_tokens=10), 60.0, **fields)  # type: ignore[arg-type]
    made = RequestRecord(request, 1, b"", 0.0, 60.0)
    made.promise = Classes(RouterConfig(classes=CLASSES)).promise(request)
    return made


def taught(streams: float, tpot_s: float, count: int = 100) -> StreamLimit:
    limit = StreamLimit(CostModel())
    for _ in range(count):
        limit.learn(streams, tpot_s)
    return limit


def test_nothing_is_limited_before_enough_answers_were_seen() -> None:
    asked = record(target_tpot_s=0.01)
    assert taught(4, 0.02, MIN_PACES - 1).tpot_s(asked) is None
    assert taught(4, 0.02, MIN_PACES).tpot_s(asked) == 0.01


def test_nothing_is_limited_without_a_target() -> None:
    assert taught(4, 0.02).tpot_s(record()) is None


def test_target_of_a_class_holds_for_its_neighbours_while_it_is_there() -> None:
    limit, chat, other = taught(4, 0.02), record(class_name="chat"), record()
    limit.enter(chat)
    assert limit.tpot_s(other) == 0.05
    limit.leave(chat)
    assert limit.tpot_s(other) is None


def test_target_of_one_client_holds_nobody_else_back() -> None:
    limit = taught(4, 0.02)
    limit.enter(record(target_tpot_s=0.001))
    assert limit.tpot_s(record()) is None


def test_streams_may_grow_while_they_are_faster_than_the_target() -> None:
    """Whatever the model says of it: at least in proportion."""
    assert taught(4, 0.02).room(record(), worker(4), 0.05) >= 6 - 1e-9


def test_streams_shrink_in_proportion_when_they_are_slower() -> None:
    assert taught(10, 0.1).room(record(), worker(0), 0.05) == pytest.approx(5.0)
    assert taught(10, 0.1).room(record(), worker(6), 0.05) < 1


def test_one_stream_may_always_run() -> None:
    assert taught(1, 0.2).room(record(), worker(0), 0.001) == 1.0


def test_limit_finds_its_way_back_after_a_slow_time() -> None:
    """Few streams are not a trap: each of their answers lets more in."""
    limit, streams = taught(20, 0.5), 1.0
    for _ in range(300):
        limit.learn(streams, 0.005 + 0.001 * streams)
        streams = min(100.0, limit.room(record(), worker(0), 0.03))
    assert streams == pytest.approx(25, rel=0.2)
