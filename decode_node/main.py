"""The decode role of a worker, from the topology; `deploy/hosting.py` runs it.

    router ─StartDecode(ticket)→ receiving ─granted, filled, verified→ running ─a token a step→ finished
    router ─StartDecode────────→ waiting ──admitted, prefilled here──→ running
    what each step means: role.py; who runs next: scheduler.py
Tokens go to the router after every step. The loop around it, with its threads, is worker/process.py.
"""

from __future__ import annotations

from ..core.clock import MonotonicClock
from ..core.cluster_key import cluster_key
from ..core.config import Topology
from ..core.ids import WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..engine.parking import Parking
from ..engine.speculation.build import build_speculation
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.ownership import Ownership
from ..worker.role import Role
from .draft_sources import draft_options, openers
from .role import DecodeRole


def make_role(
    me: WorkerKey, engine: Engine, pool: BlockPool, topology: Topology, ownership: Ownership | None = None
) -> Role:
    destination, key = DestinationTable(topology.transfer.lease_s), cluster_key(topology)
    parking = Parking(engine.memory, topology.decode.park_bytes, MonotonicClock())
    speculation = topology.speculation
    return DecodeRole(
        me,
        engine.spec,
        pool,
        destination,
        key,
        max_running=topology.decode.max_num_seqs,
        parking=parking,
        ownership=ownership,
        speculation=build_speculation(
            speculation.method,
            speculation.max_tokens,
            engine.spec,
            openers(engine, draft_options(topology)),
            MonotonicClock(),
        ),
    )
