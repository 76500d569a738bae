"""The prefill role of a worker, from the topology; `deploy/hosting.py` runs it.

    router ─StartPrefill→ waiting ─admit→ computing ─chunk by chunk→ handing ─Ack→ ended          (role.py)
                                             └──Offer, Push…, Done→ decode worker                 (kvtransfer)
The loop around it, with its threads, is worker/process.py.
"""

from __future__ import annotations

from ..core.cluster_key import cluster_key
from ..core.config import Topology
from ..core.ids import WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..kvtransfer.ownership import Ownership
from ..kvtransfer.source import PushSizes, SourceTable
from ..worker.role import Role
from .role import PrefillRole


def make_role(
    me: WorkerKey, engine: Engine, pool: BlockPool, topology: Topology, ownership: Ownership | None = None
) -> Role:
    spec, lease_s = engine.spec, topology.transfer.lease_s
    source = SourceTable(lease_s, lease_s, PushSizes.of(spec.fingerprint.num_layers, spec.layer_bytes))
    return PrefillRole(me, spec, pool, source, cluster_key(topology), ownership=ownership)
