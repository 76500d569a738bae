"""A worker process that can host either role: `penstock prefill`, `penstock decode`, `penstock serve --colocated`.

It begins with what the topology says of it and hosts another role where `penstock role` asks for it. With both roles
its own requests are prefilled where they decode, with a hand-off that moves nothing; for others it can prefill too.
"""

from __future__ import annotations

from ..core.config import Topology
from ..core.ids import WorkerKey
from ..decode_node.main import make_role as decode_role
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..kvtransfer.ownership import Ownership
from ..prefill_node.main import make_role as prefill_role
from ..protocol.messages import Role as RoleName
from ..worker.launch import launch
from ..worker.role import Role


def make_role(
    name: RoleName,
    me: WorkerKey,
    engine: Engine,
    pool: BlockPool,
    topology: Topology,
    ownership: Ownership | None = None,
) -> Role:
    make = prefill_role if name == "prefill" else decode_role
    return make(me, engine, pool, topology, ownership)


def main(topology: Topology, name: str) -> int:
    """Serve as worker `name` until SIGTERM."""
    return launch(topology, name, make_role)
