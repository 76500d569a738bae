"""Which part holds requests up, said in a sentence, with the figures it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .report import Bottleneck, Latency, PartRow, Pipe, WorkerUse

FULL = 0.9  # share of KV blocks in use from which on a decode worker counts as full
IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Cause:
    """Some parts of a latency that one thing is behind, and what can be done about it."""

    name: str
    parts: tuple[str, ...]
    what: str
    remedy: str


TTFT_CAUSES = (
    Cause("gateway", ("gateway", "delivery", "write"), "the gateway itself", "its process may need a core of its own"),
    Cause(
        "router-queue", ("queue",), "requests wait in the router for a decode worker with room", "add decode workers"
    ),
    Cause("lost-attempts", ("retry",), "attempts fail and are made again", "`penstock status` and the log say which"),
    Cause(
        "route",
        ("route",),
        "messages between router and workers, and the wait for the step that runs there",
        "shorter steps: lower max_num_batched_tokens",
    ),
    Cause("prefill-queue", ("prefill_queue",), "prompts wait for a prefill worker", "add prefill workers"),
    Cause(
        "prefill-sharing", ("prefill_wait",), "prompts wait between their chunks for other work", "add prefill workers"
    ),
    Cause(
        "prefill-compute",
        ("prefill_compute", "first_step"),
        "computing the prompts",
        "faster workers, shorter prompts, or prefixes that are cached",
    ),
    Cause("transfer", ("transfer",), "handing the KV cache over", "`penstock bench transfer` measures the transports"),
    Cause(
        "decode-room",
        ("decode_wait",),
        "decode workers have no blocks for what is computed",
        "add decode workers, or KV memory",
    ),
    Cause("unknown", ("other",), "nobody accounts for it", "workers of another version tell no phases"),
)
# The router keeps room on a decode worker for a request from its dispatch on: a long prefill queue leaves none.
PREFILL_BEHIND = Cause(
    "prefill-queue",
    ("queue", "prefill_queue"),
    "prompts wait for a prefill worker, and in the router for the room on decode workers that those before them hold",
    "add prefill workers",
)
ITL_CAUSES = (
    Cause("decode-step", ("step",), "computing decode steps", "smaller batches: add decode workers"),
    Cause(
        "decode-wait",
        ("wait",),
        "waiting between steps: the loop, other work, or a preemption",
        "look at preemptions and KV use",
    ),
    Cause(
        "prompts-in-steps", ("prompts",), "prompts computed in the same steps", "prefill them apart, on prefill workers"
    ),
    Cause(
        "delivery", ("delivery",), "the way from the worker to the gateway", "its process may need a core of its own"
    ),
)


def name_bottleneck(ttft: Latency, workers: list[WorkerUse], pipe: Pipe, max_queued: int) -> Bottleneck:
    """The cause with the largest share of the p90 TTFT."""
    if not ttft.count:
        return Bottleneck(IDLE, "No request has had its first token within the window: nothing holds anything up.", [])
    cause = _behind(_largest(TTFT_CAUSES, ttft.parts), workers)
    at = _share(cause, ttft.parts)
    sentence = f"{_sentence(cause, at[1], 'TTFT')}; {cause.remedy}."
    evidence = [_shares_line(at, "TTFT"), *_pool_lines(workers)]
    if max_queued:
        evidence.append(f"up to {max_queued} requests in the router's queue")
    if pipe.bytes_per_s:
        evidence.append(f"{pipe.handoffs} hand-offs, {pipe.bytes_per_s / 1e6:.0f} MB/s while one is on its way")
    return Bottleneck(cause.name, sentence, evidence)


def name_stream_bottleneck(itl: Latency, workers: list[WorkerUse]) -> Bottleneck:
    """The cause with the largest share of the p90 gap between tokens."""
    if not itl.count:
        return Bottleneck(IDLE, "No stream has had two tokens within the window.", [])
    cause = _largest(ITL_CAUSES, itl.parts)
    at = _share(cause, itl.parts)
    evidence = [_shares_line(at, "ITL"), *_pool_lines([worker for worker in workers if worker.role != "prefill"])]
    return Bottleneck(cause.name, f"{_sentence(cause, at[1], 'ITL')}; {cause.remedy}.", evidence)


def _behind(cause: Cause, workers: list[WorkerUse]) -> Cause:
    """A queue in the router is prefill's when prefill is the busier pool and decode has blocks to spare."""
    prefill = [worker for worker in workers if worker.role == "prefill"]
    decode = [worker for worker in workers if worker.role != "prefill"]
    if cause.name != "router-queue" or not prefill or _most(decode, lambda worker: worker.kv_used) >= FULL:
        return cause
    is_busier = _most(prefill, lambda worker: worker.utilisation or 0) > _most(decode, lambda w: w.utilisation or 0)
    return PREFILL_BEHIND if is_busier else cause


def _largest(causes: tuple[Cause, ...], parts: list[PartRow]) -> Cause:
    return max(causes, key=lambda cause: _share(cause, parts)[1])


def _share(cause: Cause, parts: list[PartRow]) -> tuple[float, float, float]:
    """At p50, p90 and p99."""
    rows = [row.share for row in parts if row.name in cause.parts]
    return sum(row.p50 for row in rows), sum(row.p90 for row in rows), sum(row.p99 for row in rows)


def _sentence(cause: Cause, share: float, latency: str) -> str:
    return f"{cause.what[0].upper()}{cause.what[1:]} ({share:.0%} of {latency} at p90)"


def _shares_line(at: tuple[float, float, float], latency: str) -> str:
    return f"share of {latency}: {at[0]:.0%} at p50, {at[1]:.0%} at p90, {at[2]:.0%} at p99"


def _pool_lines(workers: list[WorkerUse]) -> list[str]:
    lines = []
    for role in ("prefill", "decode", "both"):
        pool = [worker for worker in workers if worker.role == role and worker.state == "ready"]
        if pool:
            lines.append(_pool_line(role, pool))
    return lines


def _pool_line(role: str, pool: list[WorkerUse]) -> str:
    busy = [worker.utilisation for worker in pool if worker.utilisation is not None]
    use = "utilisation unknown"
    if busy:
        use = f"{min(busy):.0%} to {max(busy):.0%} busy" if len(busy) > 1 else f"{busy[0]:.0%} busy"
    waiting = _most(pool, lambda worker: worker.max_waiting)
    kv_used = _most(pool, lambda worker: worker.kv_used)
    noun = "worker" if len(pool) == 1 else "workers"
    return f"{len(pool)} {role} {noun}: {use}, up to {waiting:.0f} waiting, KV use up to {kv_used:.0%}"


def _most(pool: list[WorkerUse], of: Callable[[WorkerUse], float]) -> float:
    return max((of(worker) for worker in pool), default=0.0)
