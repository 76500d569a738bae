"""What another cluster would have made of the window: replayed as it was, then with a worker more or fewer."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.quantiles import quantile
from .parts import TTFT_PARTS
from .replay import Job, Size, replay
from .report import Change, WhatIf, WorkerUse
from .usage import batch_of, step_line
from .window import RequestFacts, Sample

MIN_REQUESTS = 20
MAX_ERROR = 0.3  # of the replayed p90 TTFT, beyond which no figure is given
REPLAYED = ("queue", "retry", "prefill_queue", "prefill_wait", "prefill_compute", "first_step", "decode_wait")


def what_if(
    requests: Sequence[RequestFacts], since_s: float, samples: Sequence[Sample], workers: Sequence[WorkerUse]
) -> WhatIf:
    """`requests`: all that are remembered, in order of arrival. Those that ended before `since_s` are replayed too, for
    the queues that they left behind, and not counted.
    """
    now = size_of(workers, samples)
    counted = [place for place, facts in enumerate(requests) if facts.at_s + facts.e2e_s >= since_s]
    if len(counted) < MIN_REQUESTS:
        return WhatIf(f"{len(counted)} requests in the window; {MIN_REQUESTS} are the least to replay", [])
    jobs = [job_of(facts, samples) for facts in requests]
    if now.decode < 1 or (now.prefill < 1 and not all(job.is_local for job in jobs)):
        return WhatIf("a pool has no ready worker now", [])
    base = _replayed(jobs, now, counted)
    measured = quantile([ttft_s(requests[place]) for place in counted], 0.9)
    error = quantile(base, 0.9) / measured - 1 if measured > 0 else 0.0
    if abs(error) > MAX_ERROR:
        why = f"the replay gives {quantile(base, 0.9) * 1e3:.0f} ms where {measured * 1e3:.0f} ms were measured (p90)"
        return WhatIf(f"{why}: what held these requests up is not in the model", [], error)
    line = step_line(samples)
    changes = [
        _change(name, base, _replayed(jobs, size, counted), _tpot(line, batch_of(samples), now.decode / size.decode))
        for name, size in sizes_beside(now)
    ]
    return WhatIf("", changes, error)


def _replayed(jobs: Sequence[Job], size: Size, counted: Sequence[int]) -> list[float]:
    ttfts = replay(jobs, size)
    return [ttfts[place] for place in counted]


def sizes_beside(now: Size) -> list[tuple[str, Size]]:
    """The clusters one step away, with their names."""
    found = []
    if now.prefill:
        found.append(("+1 prefill worker", Size(now.prefill + 1, now.decode, now.blocks)))
    found.append(("+1 decode worker", Size(now.prefill, now.decode + 1, now.blocks)))
    if now.prefill and now.decode > 1:
        found.append(("one decode worker prefills instead", Size(now.prefill + 1, now.decode - 1, now.blocks)))
    if now.prefill > 1:
        found.append(("one prefill worker decodes instead", Size(now.prefill - 1, now.decode + 1, now.blocks)))
    return found


def size_of(workers: Sequence[WorkerUse], samples: Sequence[Sample]) -> Size:
    """The cluster as it is now."""
    ready = [worker for worker in workers if worker.state == "ready"]
    roles = [worker.role for worker in ready]
    blocks = [worker.total_blocks for worker in samples[-1].workers if worker.role != "prefill"] if samples else []
    return Size(roles.count("prefill"), len(roles) - roles.count("prefill"), max(1, *blocks, 1))


def job_of(facts: RequestFacts, samples: Sequence[Sample]) -> Job:
    total_s = ttft_s(facts)
    parts = dict(zip(TTFT_PARTS, facts.ttft_us, strict=True))
    block_size = max((worker.block_size for worker in samples[-1].workers), default=0) if samples else 0
    return Job(
        arrival_s=facts.at_s,
        prefill_s=facts.work_s,
        fixed_s=total_s - sum(parts[name] for name in REPLAYED) / 1e6,
        residence_s=facts.residence_s,
        blocks=-(-(facts.num_prompt_tokens + facts.num_tokens) // max(1, block_size)),
        is_local=facts.prefill is None,
    )


def ttft_s(facts: RequestFacts) -> float:
    return sum(facts.ttft_us) / 1e6


def _change(name: str, base: list[float], changed: list[float], tpot: float | None) -> Change:
    ratios = [quantile(changed, q) / before - 1 if (before := quantile(base, q)) > 0 else 0.0 for q in (0.5, 0.9, 0.99)]
    p50, p90, p99 = ratios
    return Change(name, p50, p90, p99, tpot)


def _tpot(line: tuple[float, float] | None, batch: float, ratio: float) -> float | None:
    """The same sequences over another number of decode workers, by the fitted time of a step; one runs at least."""
    if line is None:
        return None
    alone_s, each_s = line
    before_s, after_s = alone_s + each_s * batch, alone_s + each_s * max(1.0, batch * ratio)
    return after_s / before_s - 1 if before_s > 0 else None
