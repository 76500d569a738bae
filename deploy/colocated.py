"""A worker that hosts both roles: `penstock serve --colocated`.

Its own requests are prefilled where they decode, with a hand-off that moves nothing; for others it can prefill too.
"""

from __future__ import annotations

from ..core.config import Topology
from ..core.ids import WorkerKey
from ..decode_node.main import make_roles as decode_roles
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..kvtransfer.ownership import Ownership
from ..prefill_node.main import make_roles as prefill_roles
from ..worker.launch import launch
from ..worker.role import Role


def make_roles(
    me: WorkerKey, engine: Engine, pool: BlockPool, topology: Topology, ownership: Ownership | None = None
) -> list[Role]:
    decode, prefill = (make(me, engine, pool, topology, ownership) for make in (decode_roles, prefill_roles))
    return [*decode, *prefill]


def main(topology: Topology, name: str) -> int:
    """Serve as worker `name` until SIGTERM."""
    return launch(topology, name, make_roles)
