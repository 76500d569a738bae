"""From samples of the cluster's state to what each worker did between the first and the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from .report import WorkerUse
from .window import Sample, WorkerSample

MIN_POINTS = 8  # for a line


def worker_uses(samples: Sequence[Sample]) -> list[WorkerUse]:
    """The workers of the last sample, by name."""
    if not samples:
        return []
    seen: dict[str, list[tuple[float, WorkerSample]]] = {}
    for sample in samples:
        for worker in sample.workers:
            seen.setdefault(worker.worker_id, []).append((sample.at_s, worker))
    return [_use(seen[worker.worker_id]) for worker in samples[-1].workers]


def _use(history: list[tuple[float, WorkerSample]]) -> WorkerUse:
    """Of its last incarnation: the sums of an earlier one say nothing about it."""
    last_s, last = history[-1]
    history = [item for item in history if item[1].epoch == last.epoch]
    first_s, first = history[0]
    span_s, steps = last_s - first_s, last.steps - first.steps
    tells = last.busy_s > 0 and span_s > 0
    return WorkerUse(
        last.worker_id,
        last.role,
        last.state,
        utilisation=min(1.0, (last.busy_s - first.busy_s) / span_s) if tells else None,
        running=fmean(worker.running for _, worker in history),
        waiting=fmean(worker.waiting for _, worker in history),
        max_waiting=max(worker.waiting for _, worker in history),
        kv_used=max(1 - worker.free_blocks / max(1, worker.total_blocks) for _, worker in history),
        prefill_tokens_per_s=(last.prefill_tokens - first.prefill_tokens) / span_s if tells else None,
        decode_tokens_per_s=(last.decode_tokens - first.decode_tokens) / span_s if tells else None,
        step_ms=1e3 * (last.busy_s - first.busy_s) / steps if tells and steps > 0 else None,
    )


def batch_of(samples: Sequence[Sample]) -> float:
    """Sequences in a decode step, on the mean over the looks that found any; at least 1."""
    running = [worker.running for sample in samples for worker in sample.workers if worker.role != "prefill"]
    return max(1.0, fmean(found)) if (found := [count for count in running if count]) else 1.0


def step_line(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """(a, b): a decode step of n sequences takes about a + b n seconds, by least squares over the samples of workers
    that decode. None where they do not tell.
    """
    points: list[tuple[float, float]] = []
    for before, after in pairwise(samples):
        earlier = {(worker.worker_id, worker.epoch): worker for worker in before.workers}
        for worker in after.workers:
            old = earlier.get((worker.worker_id, worker.epoch))
            if (
                worker.role == "prefill"
                or old is None
                or worker.steps <= old.steps
                or not (worker.running + old.running)
            ):
                continue
            took_s = (worker.busy_s - old.busy_s) / (worker.steps - old.steps)
            points.append((max(1.0, (worker.running + old.running) / 2), took_s))
    if len(points) < MIN_POINTS:
        return None
    mean_n, mean_s = fmean(n for n, _ in points), fmean(s for _, s in points)
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    if spread < MIN_POINTS / 4:
        return None
    slope = max(0.0, sum((n - mean_n) * (s - mean_s) for n, s in points) / spread)
    return max(0.0, mean_s - slope * mean_n), slope
