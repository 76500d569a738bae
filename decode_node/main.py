"""`penstock decode`: a worker that hosts the decode role.

    router ─StartDecode(ticket)→ receiving ─granted, filled, verified→ running ─a token a step→ finished
    router ─StartDecode────────→ waiting ──admitted, prefilled here──→ running
    what each step means: role.py; who runs next: scheduler.py
Tokens go to the router after every step. The loop around it, with its threads, is worker/process.py.
"""

from __future__ import annotations

from ..core.cluster_key import cluster_key
from ..core.config import Topology
from ..core.ids import WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.interface import EngineSpec
from ..kvtransfer.destination import DestinationTable
from ..worker.launch import launch
from ..worker.role import Role
from .role import DecodeRole


def make_roles(me: WorkerKey, spec: EngineSpec, pool: BlockPool, topology: Topology) -> list[Role]:
    destination = DestinationTable(topology.transfer.lease_s)
    key = cluster_key(topology)
    return [DecodeRole(me, spec, pool, destination, key, max_running=topology.decode.max_num_seqs)]


def main(topology: Topology, name: str) -> int:
    """Serve as decode worker `name` until SIGTERM."""
    return launch(topology, name, make_roles)
