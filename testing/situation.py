"""Where everything stands in a simulated cluster, in a few lines: printed when a promise breaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..core.ids import Ticket
from ..router.core import RouterCore
from .journal import Journal
from .sim_worker import SimWorker
from .story import tell


def situation(router: RouterCore, workers: Iterable[SimWorker], journal: Journal) -> Iterator[str]:
    """Lines about the router, each worker's pool and hand-offs, and each request that has not ended."""
    status = router.status()
    requests = f"{status.active_requests} requests active, {status.queued_requests} queued"
    yield f"router: {requests}; {status.why_not_ready or 'ready'}"
    rows = {row.worker_id: row.state for row in status.workers}
    for worker in workers:
        yield from _worker_lines(worker, rows.get(worker.key.worker_id, "unknown"))
    for name, record in journal.records.items():
        if record.end is None:
            have = [
                f"{len(c.token_ids)} of {len(e)}" for c, (e, _) in zip(record.choices, record.expected, strict=True)
            ]
            yield f"{name}: {len(record.request.prompt_ids)} prompt tokens, has {', '.join(have)} tokens"


def _worker_lines(worker: SimWorker, state: str) -> Iterator[str]:
    load = worker.core.snapshot().load
    counts = (
        f"{load.running} running, {load.waiting} waiting, {load.receiving} receiving, {load.handing_off} handing off"
    )
    blocks = f"{load.free_blocks} of {load.total_blocks} blocks free ({load.cached_blocks} cached)"
    yield f"{tell(worker.key)} ({'alive' if worker.is_alive else 'dead'}, router says {state}): {blocks}; {counts}"
    for role in worker.core.roles:
        for table in role.owners():
            yield f"    holds blocks {table}"
    sides = (("sends", worker.source.active()), ("receives", worker.destination.active()))
    for verb, tickets in sides:
        if tickets:
            yield f"    {verb} {', '.join(_short(ticket) for ticket in tickets)}"


def _short(ticket: Ticket) -> str:
    return ticket[:2].hex()
