"""The parts of a time to the first token, and of a gap between tokens. They add up to the whole, to the microsecond.

    received ─gateway─ submitted ─queue─ first dispatch ─retry─ dispatch of the attempt that answered
      ─route (both ways)─ ┌ prefill_queue, prefill_wait, prefill_compute, first_step, transfer, decode_wait ┐
      first tokens at the router ─delivery─ taken by the gateway ─write─ first piece of the answer written

Workers tell durations, never times of day, so clocks of different machines do not meet. What the worker claims beyond
what the router has seen is cut off; what nobody claims is `other`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.messages import Phases, StepTime
from ...router.interface import Routing

TTFT_PARTS = (
    "gateway",
    "queue",
    "retry",
    "route",
    "prefill_queue",
    "prefill_wait",
    "prefill_compute",
    "first_step",
    "transfer",
    "decode_wait",
    "delivery",
    "write",
    "other",
)
ITL_PARTS = ("wait", "prompts", "step", "delivery")
Microseconds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Marks:
    """Seconds of the gateway's clock. `written_s`: None where the answer is sent as a whole."""

    received_s: float
    submitted_s: float
    first_token_s: float
    written_s: float | None = None


def split_ttft(marks: Marks, phases: Phases, routing: Routing | None) -> Microseconds:
    """In the order of TTFT_PARTS; the sum is from `received_s` to the first piece written, or the first token taken."""
    end_s = marks.first_token_s if marks.written_s is None else marks.written_s
    in_router_s = marks.first_token_s - marks.submitted_s
    worker = worker_parts(phases)
    if routing is None:
        before, delivery_s, worker = (0.0, 0.0, 0.0), 0.0, clip(worker, in_router_s)[:-1]
    else:
        *worker_s, route_s = clip(worker, routing.attempt_s)
        worker = tuple(worker_s)
        before = (routing.queue_s, routing.retry_s, route_s)
        delivery_s = max(0.0, in_router_s - routing.queue_s - routing.retry_s - routing.attempt_s)
    claims = (marks.submitted_s - marks.received_s, *before, *worker, delivery_s, end_s - marks.first_token_s)
    return in_microseconds(clip(claims, end_s - marks.received_s))


def worker_parts(phases: Phases) -> tuple[float, ...]:
    """prefill_queue to decode_wait. A worker that tells no steps has spent all of its prefill computing."""
    compute_s = min(phases.compute_s, phases.prefill_s) or phases.prefill_s
    first_step_s = min(phases.first_step_s, compute_s)
    room_s = min(phases.room_s, phases.transfer_s)
    return (
        phases.queue_s,
        phases.prefill_s - compute_s,
        compute_s - first_step_s,
        first_step_s,
        phases.transfer_s - room_s,
        room_s,
    )


def split_gap(gap_s: float, wait_s: float, step: StepTime | None) -> Microseconds:
    """In the order of ITL_PARTS. A gap shorter than its step follows one that was delivered late."""
    if step is None:
        return in_microseconds((*clip((wait_s,), gap_s)[:-1], 0.0, 0.0, max(0.0, gap_s - wait_s)))
    prompts_s = min(step.prompts_s, step.step_s)
    return in_microseconds(clip((wait_s, prompts_s, step.step_s - prompts_s), gap_s))


def clip(claims: Sequence[float], total: float) -> tuple[float, ...]:
    """Each claim as far as something is left of `total`, in order; the last value is what nobody claims."""
    left, parts = max(0.0, total), []
    for claim in claims:
        part = min(max(0.0, claim), left)
        left -= part
        parts.append(part)
    return (*parts, left)


def in_microseconds(parts: Sequence[float]) -> Microseconds:
    """Whole numbers whose sum is the rounded sum of `parts`."""
    rounded: list[int] = []
    passed_s, told = 0.0, 0
    for part in parts:
        passed_s += part
        rounded.append(round(passed_s * 1e6) - told)
        told += rounded[-1]
    return tuple(rounded)
