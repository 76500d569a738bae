"""The memory files in which the workers of one host keep their KV blocks together (`engine.shared_pool`).

    supervisor   makes two empty files, lets every worker inherit them, and keeps them open until the cluster ends
    worker       finds their descriptors in its environment

The blocks and the ledger of their owners are files of their own: a peer or a library that registers the blocks cannot
write to the ledger. The files outlive every worker, so what a killed one owned waits there for its next incarnation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..core.errors import ConfigError
from .kv_memory import open_memfd

ENVIRONMENT = "PENSTOCK_SHARED_POOL"  # "blocks,ledger": the two descriptors that a worker inherits


class SharedFiles:
    """The two memory files, as the supervisor holds them. Raises ConfigError where the system has none."""

    def __init__(self) -> None:
        self._blocks = open_memfd("penstock-blocks")
        self._ledger = open_memfd("penstock-ledger")
        self._is_open = True

    @property
    def fds(self) -> tuple[int, int]:
        """What a worker inherits."""
        return self._blocks, self._ledger

    def environment(self) -> dict[str, str]:
        """Tells a worker which descriptors they are."""
        return {ENVIRONMENT: f"{self._blocks},{self._ledger}"}

    def close(self) -> None:
        """The memory goes when the last worker has. Idempotent."""
        if self._is_open:
            self._is_open = False
            os.close(self._blocks)
            os.close(self._ledger)


def inherited_fds(environment: Mapping[str, str]) -> tuple[int, int]:
    """The descriptors of the shared files; raises ConfigError when the supervisor passed none."""
    text = environment.get(ENVIRONMENT, "")
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            f"transfer.one_pool: {ENVIRONMENT}={text!r} names no two descriptors; the pool is the supervisor's, so "
            "start the workers through `penstock serve`, or set one_pool to false"
        )
    return int(parts[0]), int(parts[1])
