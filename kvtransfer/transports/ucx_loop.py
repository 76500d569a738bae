"""One thread that owns a UCX worker: every call of ucxx happens on it, and it sleeps when there is nothing to do.

    submit (any thread) → queue → the loop posts it, makes progress, and wakes who waits for it
                                  nothing moves: arm the worker's event descriptor and poll it beside our own

ucxx's own asyncio front end keeps a core busy while anything is awaited, and cannot cancel. Here a wait costs nothing,
and aborting an endpoint fails what is posted on it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ...core.errors import TransferFailed
from ..bulk import Unusable
from .library import library_errors, set_defaults, use_ucx_of
from .pieces import Bytes

logger = logging.getLogger(__name__)

HELP = "pip install 'penstock[ucx]'"
_DEFAULTS = {
    "UCX_TLS": "tcp,self",  # with error handling on, which we need, the wheel's UCX has nothing else for host memory
    "UCX_NET_DEVICES": "lo",  # UCX listens on every interface otherwise
    "UCX_MEMTYPE_CACHE": "n",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
_POLL_MS = 1000
_ABORT_NS = 100_000_000


class Operation:
    """One message on its way. The caller keeps its buffer alive until `wait` returns."""

    def __init__(self, post: Callable[[Any], Any], endpoint: int) -> None:
        self.post, self.endpoint = post, endpoint
        self.request: Any = None
        self._done, self._error = threading.Event(), ""

    def finish(self, error: str = "") -> None:
        self._error, self.request = error, None
        self._done.set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises TransferFailed when it failed, was aborted, or takes longer."""
        if not self._done.wait(timeout_s):
            raise TransferFailed(f"the peer does not answer over UCX within {timeout_s} s")
        if self._error:
            raise TransferFailed(self._error)


class UcxLoop:
    """Thread-safe. Endpoints are numbers, so that no object of the library is used or freed on another thread."""

    def __init__(self) -> None:
        """Raises Unusable when the library is missing or does not start."""
        self._ucx, self._array = _load()
        self._commands: deque[Callable[[], None]] = deque()
        self._active: list[Operation] = []
        self._endpoints: dict[int, Any] = {}
        self._next_endpoint = 0
        self._worker: Any = None
        self._closing = self._ended = False
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._address, self._broken = b"", ""
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="kv-ucx")
        self._thread.start()
        started.wait()
        if self._broken:
            self.close()
            raise Unusable(f"ucx: {self._broken}")

    @property
    def address(self) -> bytes:
        """What a peer needs to connect."""
        return self._address

    def connect(self, address: bytes) -> int:
        """An endpoint to the worker with this address. Errors appear at its first operation."""
        with self._lock:
            number, self._next_endpoint = self._next_endpoint, self._next_endpoint + 1
        self._do(lambda: self._open(number, address))
        return number

    def send(self, endpoint: int, data: Bytes, tag: int) -> Operation:
        return self._submit(endpoint, lambda end: end.tag_send(self._array(data), self._ucx.UCXXTag(tag)))

    def receive(self, endpoint: int, data: Bytes, tag: int) -> Operation:
        """Fill `data` with the message of exactly that many bytes."""
        return self._submit(endpoint, lambda end: end.tag_recv(self._array(data), self._ucx.UCXXTag(tag)))

    def abort(self, endpoint: int) -> None:
        """Fail all operations of the endpoint, now and later. Idempotent."""
        self._do(lambda: self._abort(endpoint))

    def settle(self, endpoint: int) -> None:
        """Abort, and return when the library has let go of every buffer."""
        done = threading.Event()
        self._do(lambda: self._abort(endpoint))
        self._do(done.set)
        done.wait()

    def close(self) -> None:
        """Abort everything and end the thread. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._do(lambda: None)
        self._thread.join()
        os.close(self._wake)

    # ---- any thread ----

    def _submit(self, endpoint: int, post: Callable[[Any], Any]) -> Operation:
        operation = Operation(post, endpoint)
        self._do(lambda: self._post(operation))
        return operation

    def _do(self, command: Callable[[], None]) -> None:
        """Have the loop run it; once the loop has ended there is no endpoint left, and it is run here to find that."""
        with self._lock:
            if not self._ended:
                self._commands.append(command)
                os.eventfd_write(self._wake, 1)
                return
        command()

    # ---- the loop's thread ----

    def _run(self, started: threading.Event) -> None:
        try:
            with library_errors("starting UCX"):
                worker = self._start()
            poller = select.poll()
            for fd in (worker.epoll_file_descriptor, self._wake):
                poller.register(fd, select.POLLIN)
            started.set()
            while not self._closing:
                self._turn(worker, poller)
        except TransferFailed as err:
            self._broken = str(err)
            logger.warning("UCX is given up: %s", err)
        finally:
            self._end()
            started.set()

    def _start(self) -> Any:
        features = (self._ucx.Feature.TAG, self._ucx.Feature.WAKEUP)
        worker = self._ucx.UCXWorker(self._ucx.UCXContext({}, features))
        worker.init_blocking_progress_mode()
        self._address = bytes(worker.address.tobytes())
        self._worker = worker
        return worker

    def _turn(self, worker: Any, poller: select.poll) -> None:
        self._run_commands()
        with library_errors("UCX progress"):
            worker.progress()
        self._finish_completed()
        with library_errors("UCX progress"):
            can_sleep = not self._commands and worker.arm()
        if can_sleep:
            poller.poll(_POLL_MS)
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                return

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _open(self, number: int, address: bytes) -> None:
        if self._worker is None:
            return
        try:
            with library_errors("connecting over UCX"):
                theirs = self._ucx.UCXAddress.create_from_buffer(address)
                make = self._ucx.UCXEndpoint.create_from_worker_address
                self._endpoints[number] = make(self._worker, theirs, endpoint_error_handling=True)
        except TransferFailed as err:
            logger.debug("%s", err)

    def _post(self, operation: Operation) -> None:
        endpoint = self._endpoints.get(operation.endpoint)
        if endpoint is None:
            operation.finish("the link is over")
            return
        try:
            with library_errors("posting over UCX"):
                endpoint.raise_on_error()
                operation.request = operation.post(endpoint)
        except TransferFailed as err:
            operation.finish(str(err))
            return
        self._active.append(operation)

    def _finish_completed(self) -> None:
        still: list[Operation] = []
        for operation in self._active:
            if not operation.request.completed:
                still.append(operation)
                continue
            try:
                with library_errors("moving bytes over UCX"):
                    operation.request.check_error()
                operation.finish()
            except TransferFailed as err:
                operation.finish(str(err))
        self._active = still

    def _abort(self, number: int) -> None:
        endpoint = self._endpoints.pop(number, None)
        if endpoint is None:
            return
        try:
            with library_errors("closing a UCX endpoint"):
                endpoint.close_blocking(period=_ABORT_NS, max_attempts=1)
        except TransferFailed as err:
            logger.debug("%s", err)
        for operation in [item for item in self._active if item.endpoint == number]:
            operation.finish("the link is over")
        self._active = [item for item in self._active if item.endpoint != number]

    def _end(self) -> None:
        """Fail whatever waits and free the library's objects on the thread that made them."""
        for number in list(self._endpoints):
            self._abort(number)
        for operation in self._active:
            operation.finish(self._broken or "the link is over")
        self._active = []
        self._worker = None
        with self._lock:
            self._ended = True
        self._run_commands()


def _load() -> tuple[Any, Any]:
    """ucxx's core module and its array type. Raises Unusable."""
    use_ucx_of("ucx")
    set_defaults(_DEFAULTS)
    try:
        from ucxx import libucxx
        from ucxx._lib.arr import Array
    except (ImportError, OSError) as err:
        raise Unusable(f"ucxx is not installed or cannot be loaded ({err}); {HELP}") from err
    return libucxx, Array
