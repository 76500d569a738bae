"""From a topology file to a running worker: load the model, size the pool, open the links, run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..core.block_names import name_key
from ..core.clock import Clock, MonotonicClock
from ..core.cluster_key import cluster_key
from ..core.config import Topology, TransferConfig, WorkerSpec
from ..core.ids import SecureIds, WorkerKey, new_epoch
from ..engine.block_pool import BlockPool
from ..engine.core_share import MANY_TOKENS, MANY_TOKENS_NATIVE, MAX_WORKERS, CoreShare, SharingEngine
from ..engine.interface import Engine
from ..engine.kv_memory import DEFAULT_KV_BYTES
from ..kvtransfer.effects import LinkEvent
from ..kvtransfer.identity import boot_id
from ..kvtransfer.link import Mesh
from ..kvtransfer.mesh import TRANSPORTS, MeshSettings, SocketMesh
from ..kvtransfer.ownership import Ownership
from ..kvtransfer.socket_link import LinkTimes
from ..kvtransfer.transports.tls import TlsFiles
from ..protocol.messages import Role as RoleName
from .background import in_background
from .core import ROLES_OF, WorkerCore
from .membership import Membership
from .process import run_worker
from .role import Role
from .router_links import Incarnation
from .turn_watch import TurnWatch

log = logging.getLogger(__name__)

LOAD_S = 60.0
CORES_FILE = "cores"  # in the runtime folder; see engine.core_share

# Which role: prefill or decode.
MakeRole = Callable[[RoleName, WorkerKey, Engine, BlockPool, Topology, Ownership | None], Role]


def launch(topology: Topology, name: str, make_role: MakeRole) -> int:
    """Run worker `name` of `topology` until SIGTERM; the exit status. It begins with the roles of its own there."""
    spec = topology.worker(name)
    key = WorkerKey(name, new_epoch(SecureIds()))
    who = Incarnation(
        key,
        spec.role,
        topology.router_address,
        drain_s=topology.gateway.drain_s,
        heartbeat_s=topology.liveness.heartbeat_s,
        runtime_dir=topology.runtime_dir,
    )
    membership = Membership(topology, spec, os.environ) if topology.transfer.one_pool else None
    engine = in_background(partial(load_engine, topology, spec, membership))
    turns = TurnWatch(MonotonicClock(), topology.liveness.max_step_s)
    make_core = partial(_make_core, topology, spec, key, make_role, membership)
    make_mesh = partial(_make_mesh, topology, spec, key, turns, membership)
    try:
        return run_worker(who, engine, make_core, make_mesh, turns)
    finally:
        if membership is not None:
            membership.close()


def load_engine(topology: Topology, spec: WorkerSpec, membership: Membership | None = None) -> Engine:
    """The torch engine for one worker. Imports torch, so only a worker process calls it."""
    import torch

    from ..engine.saturation import STEPS
    from ..engine.torch_engine import TorchEngine

    pool = spec.config
    path, slot = Path(topology.runtime_dir) / CORES_FILE, topology.workers().index(spec) % MAX_WORKERS
    share = CoreShare(path, slot, pool.threads or torch.get_num_threads(), MonotonicClock())
    # Loading takes its share like a step: the workers that serve meanwhile must not wait for each other's threads.
    torch.set_num_threads(share.begin(LOAD_S))
    engine = TorchEngine.load(
        Path(topology.model.source),
        model_name=topology.model.served_name,
        dtype=pool.dtype or topology.model.dtype,
        quantization=topology.model.quantization,
        num_blocks=pool.num_blocks,
        kv_bytes=pool.kv_cache_bytes or DEFAULT_KV_BYTES,
        block_size=pool.block_size or topology.block_size,
        max_model_len=topology.model.max_model_len,
        measures_chunks=pool.max_num_batched_tokens is None,
        measures_steps=STEPS[-1] if spec.role != "prefill" and topology.speculation.method != "off" else 0,
        make_memory=membership.make_memory if membership is not None else None,
    )
    share.rest()
    few = MANY_TOKENS_NATIVE if engine.is_native else MANY_TOKENS
    return SharingEngine(engine, share, engine.set_num_threads, few)


def _make_core(
    topology: Topology,
    spec: WorkerSpec,
    key: WorkerKey,
    make_role: MakeRole,
    membership: Membership | None,
    engine: Engine,
    clock: Clock,
) -> WorkerCore:
    ownership: Ownership | None = None
    if membership is not None:
        pool = membership.first_pool(engine.spec.block_size)
        ownership = membership.ownership(pool, keep_prefix=topology.transfer.keep_prefix)
    else:
        pool = BlockPool(engine.spec.num_blocks, engine.spec.block_size)

    def host(name: RoleName) -> Role:
        return make_role(name, key, engine, pool, topology, ownership)

    return WorkerCore(
        key,
        spec.role,
        engine,
        pool,
        [host(name) for name in ROLES_OF[spec.role]],
        clock,
        max_batch_tokens=spec.config.max_num_batched_tokens or engine.spec.saturation_tokens,
        max_batch_seqs=spec.config.max_num_seqs,
        make_role=host,
        block_secret=name_key(cluster_key(topology)),
    )


def _make_mesh(
    topology: Topology,
    spec: WorkerSpec,
    key: WorkerKey,
    turns: TurnWatch,
    membership: Membership | None,
    engine: Engine,
    on_event: Callable[[LinkEvent], None],
) -> Mesh:
    chosen = topology.transfer.transport
    owner = membership.transport(engine.memory, boot_id()) if membership is not None else None
    transports = TRANSPORTS if chosen == "auto" else (chosen,)
    return SocketMesh(
        key,
        spec.role,
        engine.spec.fingerprint,
        engine.memory,
        on_event,
        runtime_dir=Path(topology.runtime_dir),
        cluster_key=cluster_key(topology),
        settings=MeshSettings(
            transports if owner is None else (owner.name, *transports),
            topology.transfer.wire_dtype,
            tls=tls_files(topology.transfer),
        ),
        times=LinkTimes(renew_s=topology.transfer.lease_s / 5, is_stalled=turns.is_stalled),
        owner=owner,
    )


def tls_files(transfer: TransferConfig) -> TlsFiles | None:
    """The files that encrypt the bytes of tcp, where they are named."""
    if transfer.tls_certificate is None or transfer.tls_key is None or transfer.tls_authority is None:
        return None
    return TlsFiles(Path(transfer.tls_certificate), Path(transfer.tls_key), Path(transfer.tls_authority))
