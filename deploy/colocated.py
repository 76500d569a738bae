"""A worker that hosts both roles: `penstock serve --colocated`.

Its own requests are prefilled where they decode, with a hand-off that moves nothing; for others it can prefill too.
"""

from __future__ import annotations

from ..core.config import Topology
from ..core.ids import WorkerKey
from ..decode_node.main import make_roles as decode_roles
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..prefill_node.main import make_roles as prefill_roles
from ..worker.launch import launch
from ..worker.role import Role


def make_roles(me: WorkerKey, engine: Engine, pool: BlockPool, topology: Topology) -> list[Role]:
    return [*decode_roles(me, engine, pool, topology), *prefill_roles(me, engine, pool, topology)]


def main(topology: Topology, name: str) -> int:
    """Serve as worker `name` until SIGTERM."""
    return launch(topology, name, make_roles)
