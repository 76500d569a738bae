"""The router's shell in the router process: one asyncio loop that owns the socket, the core, a timer and the streams.

    frames ─→ receive task ─→ core ─→ effects ─┬─→ socket (commands to workers)
    submit, cancel, worker_exited ─→ core      └─→ a bounded queue for each request ─→ its stream
    loop timer at `core.next_deadline` ─→ core.tick

All of it runs in the loop's thread, so the core needs no lock. A stream whose reader is too slow loses its request, so
it delays nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable

from ..core.clock import Clock, MonotonicClock
from ..core.errors import InternalError, Overloaded, ProtocolError, ServeError, Unavailable
from ..core.ids import IdSource, SecureIds, WorkerKey
from ..protocol import codec
from ..protocol.messages import Hello, Role
from ..protocol.sockets import RouterSocket, SocketCounters
from .config import RouterConfig, RouterCounters
from .core import RouterCore
from .effects import Deliver, Effect, End, Send
from .interface import ClusterStatus, EndEvent, Event, GenerateRequest
from .process_watch import ProcessWatch

MAX_STREAM_EVENTS = 4096
FRAMES_PER_TURN = 64  # then other tasks of the loop have a turn
STALL_S = 0.25
CATCH_UP_S = 0.05
MAX_ROUTES = 8192

log = logging.getLogger(__name__)


class RequestStream:
    """The events of one request, read by one task. `cancel` is safe at any time."""

    def __init__(self, request_id: str, max_events: int, on_cancel: Callable[[str, int | None], None]) -> None:
        self.request_id = request_id
        self._max_events = max_events
        self._on_cancel = on_cancel
        self._events: deque[Event] = deque()
        self._has_news = asyncio.Event()
        self._is_over = False  # the end has been put
        self._is_read = False  # and taken

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._is_read:
            raise StopAsyncIteration
        while not self._events:
            self._has_news.clear()
            await self._has_news.wait()
        event = self._events.popleft()
        self._is_read = isinstance(event, EndEvent)
        return event

    def cancel(self, choice: int | None = None) -> None:
        if not self._is_over:
            self._on_cancel(self.request_id, choice)

    def put(self, event: Event) -> bool:
        """False when the reader is `max_events` behind. The end always fits."""
        self._is_over = self._is_over or isinstance(event, EndEvent)
        if len(self._events) >= self._max_events and not isinstance(event, EndEvent):
            return False
        self._events.append(event)
        self._has_news.set()
        return True


class RouterService:
    """Implements `interface.Router`. Use from one loop only, between `start` and `stop`."""

    def __init__(
        self,
        config: RouterConfig,
        address: str,
        *,
        clock: Clock | None = None,
        ids: IdSource | None = None,
        cluster_key: bytes = b"",
        max_stream_events: int = MAX_STREAM_EVENTS,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._core = RouterCore(config, self._clock, ids or SecureIds(), cluster_key)
        self._watch = ProcessWatch(self._on_process_ended)
        self._given_address = address
        self._max_stream_events = max_stream_events
        self._streams: dict[str, RequestStream] = {}
        self._routes: OrderedDict[WorkerKey, bytes] = OrderedDict()
        self._socket: RouterSocket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._over = asyncio.Event()  # stopped, or broken
        self._failure: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._pending: deque[Effect] = deque()
        self._is_performing = False
        self.bad_frames = 0
        self.slow_readers = 0

    # ---- life

    async def start(self) -> None:
        """Listen for workers; raises ConfigError when the address cannot be used."""
        self._socket = RouterSocket(self._given_address)
        self._receiver = asyncio.create_task(self._receive(self._socket), name="router-receive")
        self._receiver.add_done_callback(self._on_receiver_done)
        self._failure = None
        self._over = asyncio.Event()

    async def stop(self) -> None:
        """End every request, then close the socket. Safe twice."""
        receiver, self._receiver = self._receiver, None
        if self._failure is None:
            self._perform(self._core.end_all(Unavailable("the router is stopping")))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if receiver is not None:
            receiver.cancel()
            await asyncio.wait([receiver])
        self._watch.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._over.set()

    async def wait(self) -> None:
        """Until `stop`; raises what broke the router, if something did. The caller then ends the process."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        """Where workers connect; with a port chosen by the system, the real one."""
        return self._socket.address if self._socket else self._given_address

    # ---- what the gateway asks

    def submit(self, request: GenerateRequest) -> RequestStream:
        """Accept a request; raises BadRequest, Overloaded, TooManyRequests or Unavailable when it is refused."""
        if self._receiver is None or self._failure is not None:
            raise Unavailable("the router is not running")
        stream = RequestStream(request.request_id, self._max_stream_events, self._cancel)
        effects = self._core.submit(request)
        self._streams[request.request_id] = stream
        self._perform(effects)
        return stream

    def status(self) -> ClusterStatus:
        return self._core.status()

    def reset_prefix_cache(self) -> None:
        self._perform(self._core.reset_prefix_cache())

    def set_role(self, worker_id: str, role: Role) -> None:
        """Ask a worker to be for something else; raises BadRequest for one that is not there or must stay."""
        self._perform(self._core.set_role(worker_id, role))

    def drain(self) -> None:
        """Refuse new requests from now on; running ones finish."""
        self._perform(self._core.drain())

    @property
    def counters(self) -> RouterCounters:
        return self._core.counters

    @property
    def socket_counters(self) -> SocketCounters:
        return self._socket.counters if self._socket else SocketCounters()

    # ---- what the supervisor says

    def worker_exited(self, worker_id: str, reason: str = "its process ended", pid: int | None = None) -> None:
        """News of a dead process, sooner than its silence. With `pid`, a successor of the same name is left alone."""
        self._perform(self._core.worker_lost(worker_id, reason, pid))

    def _on_process_ended(self, key: WorkerKey) -> None:
        self._perform(self._core.process_ended(key, "its process ended"))

    # ---- frames

    async def _receive(self, socket: RouterSocket) -> None:
        taken = 0
        while True:
            identity, data = await socket.recv()
            self._on_frame(identity, data)
            taken += 1
            if taken % FRAMES_PER_TURN == 0:
                # A frame that is already there does not suspend the task; under a flood nobody else would run.
                await asyncio.sleep(0)

    def _on_frame(self, identity: bytes, data: bytes) -> None:
        try:
            frame = codec.from_worker.decode(data)
        except ProtocolError as error:
            self.bad_frames += 1
            log.debug("frame from %r dropped: %s", identity[:80], error)
            return
        if not identity.startswith(frame.worker_id.encode() + b"@"):
            self.bad_frames += 1
            return
        key = WorkerKey(frame.worker_id, frame.epoch)
        self._note_route(key, identity)
        if isinstance(frame.body, Hello) and self._socket is not None:
            self._watch.add(key, self._socket.pid_of(identity))
        self._perform(self._core.on_message(frame))

    def _note_route(self, worker: WorkerKey, identity: bytes) -> None:
        self._routes[worker] = identity
        self._routes.move_to_end(worker)
        if len(self._routes) > MAX_ROUTES:
            self._routes.popitem(last=False)

    def _on_receiver_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._break(error)

    def _break(self, failure: BaseException) -> None:
        """Our own bug: the books can no longer be trusted, and no caller may be left waiting."""
        log.critical("the router failed", exc_info=failure)
        self._failure = failure
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(EndEvent(InternalError("the router failed; its log says why")))
        self._over.set()

    # ---- effects

    def _perform(self, effects: list[Effect]) -> None:
        """Carry effects out in order. One may cause more: those go to the end of the line."""
        self._pending.extend(effects)
        if not self._is_performing:
            self._is_performing = True
            try:
                while self._pending:
                    self._perform_one(self._pending.popleft())
            finally:
                self._is_performing = False
        self._arm_timer()

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            case Send(worker, message):
                identity = self._routes.get(worker)
                if self._socket is not None and identity is not None:
                    self._socket.send(identity, codec.from_router.encode(message))
            case Deliver(request_id, event):
                stream = self._streams.get(request_id)
                if stream is not None and not stream.put(event):
                    self._drop_slow(request_id)
            case End(request_id, event):
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    stream.put(event)

    def _drop_slow(self, request_id: str) -> None:
        self.slow_readers += 1
        error = Overloaded(f"the stream was not read: {self._max_stream_events} events wait, the bound is reached")
        self._cancel(request_id, error=error)

    def _cancel(self, request_id: str, choice: int | None = None, error: ServeError | None = None) -> None:
        self._perform(self._core.cancel(request_id, choice, error))

    # ---- time

    def _arm_timer(self) -> None:
        """Wake at the core's next deadline."""
        due = self._core.next_deadline
        if due is None or self._receiver is None or self._failure is not None:
            return
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._set_timer(due)

    def _set_timer(self, due: float) -> None:
        self._timer_due = due
        delay = max(0.001, due - self._clock.now())
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock.now()
        if now - self._timer_due > STALL_S:
            # This process itself slept: what its workers said meanwhile waits in the socket and comes first.
            self._set_timer(now + CATCH_UP_S)
            return
        try:
            self._perform(self._core.tick())
        except Exception as error:
            # Raised in a timer of the loop it would only be logged, and time would stand still.
            log.exception("a deadline could not be handled")
            self._break(error)
