"""One NIXL agent and the lock around it: the only module that calls the library.

NIXL without its own progress thread, which burns a core even when idle. Somebody has to make progress for peers that
connect to us, and for those that read over a network without RDMA, where UCX answers a read in software: a thread of
ours does, often for a while after there was something to read, rarely otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.errors import TransferFailed
from ..bulk import Unusable
from .library import library_errors, set_defaults, use_ucx_of

logger = logging.getLogger(__name__)

HELP = "pip install --no-deps nixl-cu12"
_DEFAULTS = {
    "UCX_TLS": "tcp,cma,self",  # host memory; with a GPU or RDMA the user names what there is
    "UCX_NET_DEVICES": "lo",  # UCX listens on every interface otherwise
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "NIXL_LOG_LEVEL": "WARN",
}
_BUSY_PAUSE_S, _IDLE_PAUSE_S, _BUSY_FOR_S = 0.0005, 0.02, 1.0
_FIRST_CHECKS, _LONGEST_CHECK_PAUSE_S = 200, 0.001

Pairs = Sequence[tuple[int, int, int]]  # (address of the peer, our address, number of bytes)


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of ours that the library may write to: `kind` is "DRAM" or "VRAM", `device` counts within it."""

    address: int
    nbytes: int
    kind: str = "DRAM"
    device: int = 0


class NixlAgent:
    """Thread-safe. Every error of the library becomes TransferFailed."""

    def __init__(self, name: str, regions: Sequence[Region]) -> None:
        """Raises Unusable when the library cannot serve."""
        nixl = _load()
        self.name = name
        self._lock = threading.Lock()
        self._registered: dict[Region, Any] = {}
        self._kept: list[object] = []
        self._left_over: list[Any] = []  # transfers that the library would not let go of
        self._busy_until, self._closed = 0.0, False
        self._nudge = threading.Event()
        try:
            with library_errors("making a NIXL agent"):
                config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
                self._agent = nixl.nixl_agent(name, config)
            for region in regions:
                self.register(region)
        except TransferFailed as err:
            raise Unusable(f"nixl: {err}") from err
        self._thread = threading.Thread(target=self._progress, name=f"kv-nixl-{name}")
        self._thread.start()

    def register(self, region: Region) -> None:
        with self._lock, library_errors("registering memory with NIXL"):
            rows = [(region.address, region.nbytes, region.device, "")]
            self._registered[region] = self._agent.register_memory(rows, region.kind)

    def deregister(self, region: Region) -> None:
        with self._lock, library_errors("deregistering memory with NIXL"):
            self._agent.deregister_memory(self._registered.pop(region))

    def keep(self, memory: object) -> None:
        """Hold on to memory that an abandoned read may still be written to, until the agent is gone."""
        self._kept.append(memory)

    @property
    def metadata(self) -> bytes:
        with self._lock, library_errors("the NIXL agent's metadata"):
            return bytes(self._agent.get_agent_metadata())

    def add(self, metadata: bytes) -> str:
        """The name of the peer's agent, which can be read from now on."""
        with self._lock, library_errors("adding a NIXL agent"):
            name = self._agent.add_remote_agent(metadata)
        self.expect_reads()
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def remove(self, name: str) -> None:
        """Disconnect; nothing of that peer is written from here on."""
        with self._lock:
            self._let_go()
            with library_errors(f"removing NIXL agent {name}"):
                self._agent.remove_remote_agent(name)

    def read(
        self,
        name: str,
        pairs: Pairs,
        check: Callable[[], None],
        like: Region,
        posted: Callable[[], None] = lambda: None,
        notice: bytes = b"",
    ) -> None:
        """Copy from the peer to us, where memory is of the kind of `like`; `posted` is called once it is on its way.

        `check` raises to give up. The transfer is abandoned then, and bytes may still be written: nothing cancels it.
        With a `notice` the peer hears of the read when it is done, and goes on making progress often.
        """
        with self._lock, library_errors(f"reading from NIXL agent {name}"):
            handle = self._agent.initialize_xfer("READ", *self._descriptors(pairs, like), name, notice)
            state = self._agent.transfer(handle)
            posted()
        try:
            state = self._settle(handle, state, check)
        finally:
            self._release(handle)
        if state != "DONE":
            raise TransferFailed(f"reading from NIXL agent {name} failed: {state}")

    def expect_reads(self) -> None:
        """A peer is about to read or to connect."""
        was_idle, self._busy_until = time.monotonic() >= self._busy_until, time.monotonic() + _BUSY_FOR_S
        if was_idle:
            self._nudge.set()

    def close(self) -> None:
        """After all reads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._nudge.set()
        self._thread.join()
        with self._lock, contextlib.suppress(TransferFailed), library_errors("closing a NIXL agent"):
            self._let_go()
            for registered in self._registered.values():
                self._agent.deregister_memory(registered)
        del self._agent
        self._registered.clear()
        self._kept.clear()

    # ---- one read ----

    def _descriptors(self, pairs: Pairs, like: Region) -> tuple[Any, Any]:
        """Ours and theirs."""
        theirs, ours, sizes = np.array(pairs, np.uint64).T
        device = np.full_like(sizes, like.device)
        local, remote = (np.stack([start, sizes, device], axis=1) for start in (ours, theirs))
        return self._agent.get_xfer_descs(local, like.kind), self._agent.get_xfer_descs(remote, like.kind)

    def _settle(self, handle: Any, state: str, check: Callable[[], None]) -> str:
        """The state in which the transfer ends; sleeps between looks, longer each time."""
        checks = 0
        while state == "PROC":
            check()
            checks += 1
            if checks > _FIRST_CHECKS:
                time.sleep(min(0.00005 * 2 ** min(checks - _FIRST_CHECKS, 10), _LONGEST_CHECK_PAUSE_S))
            with self._lock, library_errors("a NIXL transfer"):
                state = self._agent.check_xfer_state(handle)
        return state

    def _release(self, handle: Any) -> None:
        with self._lock:
            try:
                with library_errors("releasing a NIXL transfer"):
                    handle.release()
            except TransferFailed as err:
                logger.debug("kept for later: %s", err)
                self._left_over.append(handle)

    def _let_go(self) -> None:
        """Try again to release what was still active; the lock is held."""
        waiting, self._left_over = self._left_over, []
        for handle in waiting:
            try:
                with library_errors("releasing a NIXL transfer"):
                    handle.release()
            except TransferFailed:
                self._left_over.append(handle)

    # ---- the progress thread ----

    def _progress(self) -> None:
        while not self._closed:
            is_busy = time.monotonic() < self._busy_until
            self._nudge.wait(_BUSY_PAUSE_S if is_busy else _IDLE_PAUSE_S)
            self._nudge.clear()
            try:
                with self._lock, library_errors("NIXL progress"):
                    has_been_read = bool(self._agent.get_new_notifs())
                if has_been_read:
                    self._busy_until = time.monotonic() + _BUSY_FOR_S
            except TransferFailed as err:
                logger.debug("%s", err)


def _load() -> Any:
    """The library, with its log where ours goes. Raises Unusable."""
    use_ucx_of("nixl")
    set_defaults(_DEFAULTS)
    raises, root = logging.raiseExceptions, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        nixl = _import()
    except (ImportError, OSError) as err:
        raise Unusable(f"nixl is not installed or cannot be loaded ({err}); {HELP}") from err
    finally:
        # Importing it sets the whole process's logging up.
        logging.raiseExceptions, root.handlers[:] = raises, handlers
        root.setLevel(level)
    own = logging.getLogger("nixl")
    own.handlers.clear()
    own.propagate = True
    own.setLevel(logging.WARNING)
    return nixl


def _import() -> Any:
    """By the name of the wheel for CUDA 12, or of the package that picks a wheel."""
    try:
        import nixl_cu12

        return nixl_cu12
    except ImportError:
        import nixl

        return nixl
