"""A worker's place in the memory that all workers of its topology share (`transfer.one_pool`)."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.config import Topology, WorkerSpec
from ..core.errors import InternalError, ProtocolError
from ..engine.block_pool import BlockPool
from ..engine.kv_memory import DEFAULT_KV_BYTES, KVMemory, blocks_in
from ..engine.shared_files import inherited_fds
from ..engine.shared_pool import SharedPool
from ..kvtransfer.ownership import Ownership, first_pool
from ..kvtransfer.transports.owner import OwnerTransport


class Membership:
    """Worker `spec` of `topology`: its number is its place in the topology's list, from 1.

    Every worker works out the shares of all from the topology and the size of a block, so nobody has to tell them.
    """

    def __init__(self, topology: Topology, spec: WorkerSpec, environment: Mapping[str, str]) -> None:
        """Raises ConfigError when the supervisor has passed no memory."""
        self._workers = topology.workers()
        self.number = 1 + self._workers.index(spec)
        self._fds = inherited_fds(environment)
        self._pool: SharedPool | None = None

    def number_of(self, worker_id: str) -> int:
        """The number of another worker; raises ProtocolError for one that is not in this topology."""
        for number, worker in enumerate(self._workers, 1):
            if worker.name == worker_id:
                return number
        raise ProtocolError(f"worker {worker_id} has no place in the shared pool of this topology")

    @property
    def pool(self) -> SharedPool:
        if self._pool is None:
            raise InternalError("the shared pool is joined when the engine makes its memory")
        return self._pool

    def make_memory(self, num_blocks: int, num_layers: int, layer_bytes: int) -> KVMemory:
        """The blocks of all workers; `num_blocks` of them are this worker's at home. Raises ConfigError."""
        shares = shares_of(self._workers, num_layers * layer_bytes)
        if shares[self.number - 1] != num_blocks:
            raise InternalError(f"worker {self.number} has {num_blocks} blocks, its share of {shares} is another")
        self._pool = SharedPool(self._fds, self.number, shares)
        return self._pool.attach(num_layers, layer_bytes)

    def first_pool(self, block_size: int) -> BlockPool:
        """All blocks that are this worker's now, those of an incarnation before it included; all free."""
        return first_pool(self.pool.ledger, self.number, block_size)

    def ownership(self, pool: BlockPool, *, keep_prefix: bool) -> Ownership:
        """This worker's side of all exchanges over its `pool`."""
        return Ownership(self.pool.ledger, pool, self.number, keep_prefix=keep_prefix, number_of=self.number_of)

    def transport(self, memory: KVMemory, host_id: str) -> OwnerTransport:
        """Links on which blocks stay where they are. `host_id` names this boot of this machine."""
        return OwnerTransport(memory, self.pool.ledger, self.number, host_id)

    def close(self) -> None:
        """Idempotent."""
        if self._pool is not None:
            self._pool.close()


def shares_of(workers: tuple[WorkerSpec, ...], block_bytes: int) -> list[int]:
    """Blocks of each worker at home, by its own setting; raises ConfigError for a cache that holds too few."""
    return [
        worker.config.num_blocks or blocks_in(worker.config.kv_cache_bytes or DEFAULT_KV_BYTES, block_bytes)
        for worker in workers
    ]
