from __future__ import annotations

import random

import pytest

from penstock.gateway.explain.parts import (
    ITL_PARTS,
    TTFT_PARTS,
    Marks,
    clip,
    in_microseconds,
    split_gap,
    split_ttft,
)
from penstock.protocol.messages import Phases, StepTime
from penstock.router.interface import Routing

PHASES = Phases(
    queue_s=0.010, prefill_s=0.100, transfer_s=0.020, compute_s=0.090, first_step_s=0.030, work_s=0.08, room_s=0.015
)
MARKS = Marks(received_s=5.0, submitted_s=5.002, first_token_s=5.199, written_s=5.200)


def named(names: tuple[str, ...], parts: tuple[int, ...]) -> dict[str, float]:
    return {name: part / 1e3 for name, part in zip(names, parts, strict=True) if part}


def test_every_part_of_a_handed_over_request_is_named() -> None:
    routing = Routing(queue_s=0.040, retry_s=0.010, attempt_s=0.140, decode="d", prefill="p")
    assert named(TTFT_PARTS, split_ttft(MARKS, PHASES, routing)) == {
        "gateway": 2,
        "queue": 40,
        "retry": 10,
        "route": 10,
        "prefill_queue": 10,
        "prefill_wait": 10,
        "prefill_compute": 60,
        "first_step": 30,
        "transfer": 5,
        "decode_wait": 15,
        "delivery": 7,
        "write": 1,
    }


def test_what_nobody_tells_is_other() -> None:
    assert named(TTFT_PARTS, split_ttft(MARKS, Phases(), None)) == {"gateway": 2, "write": 1, "other": 197}


def test_worker_that_tells_no_steps_has_computed_all_along() -> None:
    parts = named(TTFT_PARTS, split_ttft(MARKS, Phases(prefill_s=0.1), Routing(0.0, 0.0, 0.15, "d")))
    assert parts["prefill_compute"] == 100
    assert "prefill_wait" not in parts
    assert parts["route"] == 50


def test_worker_that_claims_more_than_has_passed_is_cut_off() -> None:
    parts = split_ttft(MARKS, Phases(queue_s=9.0, transfer_s=3.0), Routing(0.05, 0.0, 0.1, "d"))
    assert named(TTFT_PARTS, parts) == {"gateway": 2, "queue": 50, "prefill_queue": 100, "delivery": 47, "write": 1}


def test_parts_add_up_to_the_microsecond_whatever_is_claimed() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        values = [rng.choice([0.0, rng.random(), rng.random() * 1e-6]) for _ in range(12)]
        marks = Marks(values[0], values[0] + values[1], values[0] + values[1] + values[2])
        if rng.random() < 0.5:
            marks = Marks(marks.received_s, marks.submitted_s, marks.first_token_s, marks.first_token_s + values[3])
        queue_s, prefill_s, transfer_s, compute_s, first_step_s, room_s = values[4:10]
        phases = Phases(queue_s, prefill_s, transfer_s, compute_s, first_step_s, room_s=room_s)
        routing = Routing(values[10], values[11], values[4], "d") if rng.random() < 0.7 else None
        parts = split_ttft(marks, phases, routing)
        end = marks.first_token_s if marks.written_s is None else marks.written_s
        assert sum(parts) == pytest.approx((end - marks.received_s) * 1e6, abs=0.6)
        assert min(parts) >= 0
        assert len(parts) == len(TTFT_PARTS)


@pytest.mark.parametrize(
    ("gap", "wait", "step", "expected"),
    [
        (0.020, 0.001, StepTime(0.015, 0.010), {"wait": 1, "prompts": 10, "step": 5, "delivery": 4}),
        (0.020, 0.0, StepTime(0.015), {"step": 15, "delivery": 5}),
        (0.004, 0.001, StepTime(0.015), {"wait": 1, "step": 3}),  # bunched behind one that was late
        (0.020, 0.004, None, {"wait": 4, "delivery": 16}),
        (0.020, 0.0, StepTime(0.01, 0.5), {"prompts": 10, "delivery": 10}),
    ],
)
def test_gap_is_split(gap: float, wait: float, step: StepTime | None, expected: dict[str, float]) -> None:
    parts = split_gap(gap, wait, step)
    assert named(ITL_PARTS, parts) == expected
    assert sum(parts) == round(gap * 1e6)


def test_clip_takes_in_order_and_leaves_the_rest() -> None:
    assert clip((1.0, -1.0, 2.0), 2.5) == (1.0, 0.0, 1.5, 0.0)
    assert clip((1.0,), 3.0) == (1.0, 2.0)
    assert clip((1.0,), -3.0) == (0.0, 0.0)


def test_rounding_loses_nothing() -> None:
    assert in_microseconds((0.4e-6,) * 5) == (0, 1, 0, 1, 0)
