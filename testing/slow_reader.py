"""I10 at the router's shell: a stream that nobody reads fills up, loses its request, and is felt by nobody else."""

from __future__ import annotations

from ..core.errors import Overloaded
from ..core.ids import SeededIds
from ..protocol.messages import SampledToken
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.effects import Deliver
from ..router.interface import EndEvent, GenerateRequest, TokensEvent
from ..router.service import RequestStream, RouterService
from .clock import FakeClock
from .invariants import InvariantBroken

MAX_EVENTS = 8
NUM_TOKENS = 5 * MAX_EVENTS


def check_unread_stream() -> None:
    """Two streams get a token each in turn; one is read at once, the other never."""
    service = RouterService(
        RouterConfig(), "ipc://never-opened", clock=FakeClock(), ids=SeededIds(0), max_stream_events=MAX_EVENTS
    )
    unread, read = (_open(service, name) for name in ("unread", "read"))
    for index in range(NUM_TOKENS):
        for stream in (unread, read):
            event = TokensEvent(0, index, (SampledToken(index),))
            service._perform([Deliver(stream.request_id, event)])
        if len(unread._events) > MAX_EVENTS + 1:
            raise InvariantBroken(f"I10 router: {len(unread._events)} events wait for a client that does not read")
        if not read._events:
            raise InvariantBroken(f"I10 router: token {index} waits because another client does not read")
        read._events.popleft()
    last = unread._events[-1]
    if service.slow_readers != 1 or not isinstance(last, EndEvent) or not isinstance(last.error, Overloaded):
        raise InvariantBroken("I10 router: a stream that nobody reads keeps its request")


def _open(service: RouterService, name: str) -> RequestStream:
    """As `submit` does, without a socket and a loop."""
    stream = RequestStream(name, MAX_EVENTS, service._cancel)
    request = GenerateRequest(name, [1], SamplingParams(max_tokens=NUM_TOKENS), 60.0)
    service._streams[name] = stream
    service._perform(service._core.submit(request))
    return stream
