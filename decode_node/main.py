"""`penstock decode`: a worker that hosts the decode role.

    router ─StartDecode(ticket)→ receiving ─granted, filled, verified→ running ─a token a step→ finished
    router ─StartDecode────────→ waiting ──admitted, prefilled here──→ running
    what each step means: role.py; who runs next: scheduler.py
Tokens go to the router after every step. The loop around it, with its threads, is worker/process.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..core.clock import MonotonicClock
from ..core.cluster_key import cluster_key
from ..core.config import Topology
from ..core.ids import WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.core_share import SharingEngine
from ..engine.interface import Engine
from ..engine.parking import Parking
from ..engine.speculation.build import Openers, build_speculation
from ..engine.speculation.interface import Proposer
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.ownership import Ownership
from ..worker.launch import launch
from ..worker.role import Role
from .role import DecodeRole


def make_roles(
    me: WorkerKey, engine: Engine, pool: BlockPool, topology: Topology, ownership: Ownership | None = None
) -> list[Role]:
    destination, key = DestinationTable(topology.transfer.lease_s), cluster_key(topology)
    parking = Parking(engine.memory, topology.decode.park_bytes, MonotonicClock())
    speculation = topology.speculation
    return [
        DecodeRole(
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
                Openers(partial(_open_draft, topology, engine), partial(_open_head, engine)),
                MonotonicClock(),
            ),
        )
    ]


def _open_draft(topology: Topology, engine: Engine, source: str) -> Engine:
    """The draft model at `source`, with a cache of its own, on the threads of `engine`. Imports torch."""
    from ..engine.torch_engine import TorchEngine

    draft = TorchEngine.load(
        Path(source),
        model_name="draft",
        dtype=topology.model.dtype,
        quantization=topology.model.quantization,
        kv_bytes=topology.speculation.draft_kv_bytes,
        block_size=engine.spec.block_size,
        measures_steps=True,
    )
    if isinstance(engine, SharingEngine):
        engine.add_engine(draft.set_num_threads)
    return draft


def _open_head(engine: Engine, source: str | None) -> Proposer | None:
    """The draft head at `source`, or the one that comes with the project. Imports torch."""
    from ..engine.speculation.open_head import open_head, open_shipped_head
    from ..engine.torch_engine import TorchEngine

    inner = engine.inner if isinstance(engine, SharingEngine) else engine
    if not isinstance(inner, TorchEngine):
        return None
    return open_shipped_head(inner) if source is None else open_head(inner, Path(source))


def main(topology: Topology, name: str) -> int:
    """Serve as decode worker `name` until SIGTERM."""
    return launch(topology, name, make_roles)
