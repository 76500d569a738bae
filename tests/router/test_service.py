"""The router's shell with real sockets: workers are coroutines on the same loop that speak over ipc."""

from __future__ import annotations

import asyncio
import random

import pytest

from penstock.core.errors import BadRequest, InternalError, NodeLost, Overloaded, Unavailable
from penstock.core.ids import WorkerKey
from penstock.protocol import codec
from penstock.protocol.messages import (
    Abort,
    AttemptFailed,
    ChoiceState,
    Fingerprint,
    FromRouter,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Output,
    PrefillEnded,
    SampledToken,
    StartDecode,
    Tokens,
    ToRouter,
    Welcome,
    WorkerLoad,
    unpack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.protocol.sockets import WorkerSocket, identity_of
from penstock.router.config import RouterConfig
from penstock.router.interface import EndEvent, GenerateRequest, Router, TokensEvent
from penstock.router.service import RouterService

HELLO = Hello(
    "both", 4242, Fingerprint("tiny", "w", "float32", 1, 1, 4, 4, "block-major"), 100, 100_000, 64, "/kv", ["shm"]
)


class FakeWorker:
    """Answers StartDecode with tokens 0, 1, 2, … one message each, and beats its heart."""

    def __init__(self, address, worker_id="d0", generation=0, pace_s=0.001):
        self.key = WorkerKey(worker_id, f"{generation:016x}")
        self.pace_s = pace_s
        self.socket = WorkerSocket(address, identity_of(self.key))
        self.received = 0
        self.running: dict[tuple[str, int], tuple[dict[int, int], int]] = {}
        self.aborted = []
        self.has_abort = asyncio.Event()
        self.is_mute = self.is_welcomed = False
        self.task = asyncio.create_task(self.run())

    def say(self, body):
        if not self.is_mute:
            self.socket.send(codec.from_worker.encode(FromWorker(*self.key, body)))

    async def run(self):
        beat_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            while (data := self.socket.recv()) is not None:
                self.take(codec.from_router.decode(data))
            self.produce()
            if loop.time() >= beat_at:
                beat_at = loop.time() + 0.1
                self.say(self.beat() if self.is_welcomed else HELLO)
            await asyncio.sleep(self.pace_s)

    def beat(self):
        return Heartbeat(self.received, "ready", WorkerLoad(100, 100), list(self.running), [])

    def take(self, frame):
        self.received = max(self.received, frame.number)
        body = frame.body
        if isinstance(body, Welcome):
            self.is_welcomed = True
        elif isinstance(body, StartDecode):
            start = {state.choice: len(unpack_ids(state.output_ids)) for state in body.choices}
            self.running[(body.request_id, body.attempt)] = (start, body.params.max_tokens)
        elif isinstance(body, Abort) and body.choice is None:
            self.aborted.append(body.request_id)
            self.has_abort.set()
            self.running.pop((body.request_id, body.attempt), None)

    def produce(self):
        if self.is_mute:
            return
        for key, (choices, limit) in list(self.running.items()):
            items = []
            for choice, index in list(choices.items()):
                is_last = index + 1 == limit
                items.append(Tokens(*key, choice, index, (SampledToken(index),), "length" if is_last else None))
                choices[choice] += 1
                if is_last:
                    del choices[choice]
            if not choices:
                del self.running[key]
            self.say(Output(items))

    async def stop(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.socket.close()


def request(name="r", max_tokens=5, timeout_s=30.0, **params):
    return GenerateRequest(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens, **params), timeout_s)


async def collect(stream):
    events = [event async for event in stream]
    assert [isinstance(event, EndEvent) for event in events] == [False] * (len(events) - 1) + [True]
    return [token.token_id for event in events[:-1] for token in event.tokens], events[-1]


@pytest.fixture
def with_service(tmp_path):
    """Run `body(service)` on a fresh loop with a service that listens; then stop it, and see that no task is left."""

    def run(body, *, max_stream_events=4096, **settings):
        async def main():
            service = RouterService(
                RouterConfig(**settings), f"ipc://{tmp_path}/r.sock", max_stream_events=max_stream_events
            )
            await service.start()
            try:
                async with asyncio.timeout(60):
                    await body(service)
            finally:
                await service.stop()
                await service.stop()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    return run


def test_service_is_a_router(tmp_path):
    service: Router = RouterService(RouterConfig(), f"ipc://{tmp_path}/r.sock")
    with pytest.raises(Unavailable, match="not running"):
        service.submit(request())


def test_submit_streams_tokens_and_ends(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        tokens, end = await collect(service.submit(request(max_tokens=20)))
        assert tokens == list(range(20))
        assert end.error is None
        assert service.status().ready
        assert service.status().workers[0].pid == 4242
        await worker.stop()

    with_service(body)


def test_many_streams_over_two_workers_all_end_right(with_service):
    async def body(service):
        workers = [FakeWorker(service.address, f"d{i}") for i in range(2)]
        streams = [service.submit(request(f"r{i}", max_tokens=1 + i % 7)) for i in range(200)]
        for i, (tokens, end) in enumerate(await asyncio.gather(*map(collect, streams))):
            assert (tokens, end.error) == (list(range(1 + i % 7)), None)
        for worker in workers:
            await worker.stop()

    with_service(body)


def test_silent_worker_is_lost_and_the_stream_goes_on_elsewhere(with_service):
    async def body(service):
        workers = {name: FakeWorker(service.address, name) for name in ("d0", "d1")}
        stream = service.submit(request(max_tokens=400))
        event = await anext(stream)
        (victim,) = [worker for worker in workers.values() if worker.running]
        victim.is_mute = True
        tokens, end = await collect(stream)
        assert [token.token_id for token in event.tokens] + tokens == list(range(400))
        assert (end.error, end.attempts) == (None, 2)
        for worker in workers.values():
            await worker.stop()

    with_service(body, worker_timeout_s=0.6)


def test_exit_told_by_the_supervisor_fails_over_at_once(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        stream = service.submit(request(max_tokens=300))
        await anext(stream)
        await worker.stop()
        service.worker_exited("d0", pid=1)
        assert service.status().ready
        service.worker_exited("d0", "killed by signal 9", pid=4242)
        assert not service.status().ready
        successor = FakeWorker(service.address, generation=1)
        _, end = await collect(stream)
        assert (end.error, end.attempts) == (None, 2)
        await successor.stop()

    with_service(body, worker_timeout_s=30)


def test_request_nobody_takes_ends_as_unavailable_by_the_timer(with_service):
    async def body(service):
        tokens, end = await collect(service.submit(request()))
        assert tokens == []
        assert isinstance(end.error, Unavailable)

    with_service(body, unavailable_s=0.1)


def test_cancel_ends_the_stream_and_stops_the_worker(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        stream = service.submit(request(max_tokens=100_000 - 3))
        await anext(stream)
        stream.cancel()
        stream.cancel()
        _, end = await collect(stream)
        assert end.error is None
        await worker.has_abort.wait()
        assert worker.aborted == ["r"]
        assert worker.running == {}
        stream.cancel(0)
        await worker.stop()

    with_service(body)


def test_cancelled_choice_is_silent_and_the_other_finishes(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        stream = service.submit(request(max_tokens=50, n=2))
        seen = {0: 0, 1: 0}
        async for event in stream:
            if isinstance(event, TokensEvent):
                seen[event.choice] += len(event.tokens)
                if event.choice == 0 and seen[0] == 3:
                    stream.cancel(0)
        assert seen[1] == 50
        assert seen[0] < 50
        await worker.stop()

    with_service(body)


def test_slow_reader_loses_its_own_request_and_delays_nobody(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        slow = service.submit(request("slow", max_tokens=5000))
        tokens, end = await collect(service.submit(request("quick", max_tokens=60)))
        assert (tokens, end.error) == (list(range(60)), None)
        await worker.has_abort.wait()
        assert service.slow_readers == 1
        tokens, end = await collect(slow)
        assert tokens == list(range(70))
        assert isinstance(end.error, Overloaded)
        await worker.stop()

    with_service(body, max_stream_events=70)


def test_refusals_at_the_door_are_raised_and_leave_nothing(with_service):
    async def body(service):
        with pytest.raises(BadRequest):
            service.submit(GenerateRequest("x", [], SamplingParams(), 1.0))
        service.drain()
        with pytest.raises(Unavailable, match="draining"):
            service.submit(request())
        assert service.status().active_requests == 0

    with_service(body)


def test_stop_ends_every_stream(tmp_path):
    async def main():
        service = RouterService(RouterConfig(), f"ipc://{tmp_path}/r.sock")
        await service.start()
        stream = service.submit(request())
        await service.stop()
        _, end = await collect(stream)
        assert isinstance(end.error, Unavailable)
        with pytest.raises(Unavailable):
            service.submit(request())

    asyncio.run(main())


def test_bug_in_the_core_ends_every_stream_and_is_told_to_the_process(with_service, monkeypatch):
    async def body(service):
        def explode(frame):
            raise ZeroDivisionError("planted")

        monkeypatch.setattr(service._core, "on_message", explode)
        stream = service.submit(request())
        worker = FakeWorker(service.address)
        _, end = await collect(stream)
        assert isinstance(end.error, InternalError)
        with pytest.raises(ZeroDivisionError):
            await service.wait()
        await worker.stop()

    with_service(body)


def mutated(frame, rng):
    """A frame with some bytes changed, cut, doubled or put in; or nothing but noise."""
    data, kind = bytearray(frame), rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 2:
        return bytes(data) + rng.randbytes(1 + rng.randrange(8))
    for _ in range(1 + rng.randrange(4)):
        at = rng.randrange(len(data))
        if kind == 3:
            data[at] = rng.randrange(256)
        elif kind == 4:
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at:at] = rng.randbytes(1 + rng.randrange(4))
    return bytes(data)


def until_welcome(socket):
    while socket.poll(30):
        while (data := socket.recv()) is not None:
            if isinstance(codec.from_router.decode(data).body, Welcome):
                return
    raise AssertionError("no Welcome in 30 s")


BODIES: list[ToRouter] = [
    HELLO,
    Heartbeat(3, "ready", WorkerLoad(10, 10), [("live", 1), ("r", 2)], [("p0", "0" * 16, "shm")]),
    Output([Tokens("other", 1, 0, 0, (SampledToken(5),), "length")]),
    PrefillEnded("other", 1, False, "transfer_failed", "x"),
    AttemptFailed("other", 1, "transfer_failed", "x", True),
    Goodbye(),
]
FRAMES_PER_TYPE = 2500


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_bad_frames_change_nothing_for_a_live_stream(with_service, body):
    """The frames come from a stranger; a mutation that stays valid names a worker that is not the live one."""

    async def run(service):
        rng = random.Random(type(body).__name__)
        worker = FakeWorker(service.address)
        stream = service.submit(request("live", max_tokens=800))
        await anext(stream)
        stranger = WorkerSocket(service.address, f"evil@{'f' * 16}")
        frame = codec.from_worker.encode(FromWorker("evil", "f" * 16, body))
        for number in range(FRAMES_PER_TYPE):
            stranger.send(mutated(frame, rng))
            if number % 50 == 0:
                await asyncio.sleep(0)
        stranger.send(b"\xc1")
        stranger.send(codec.from_worker.encode(FromWorker("evil", "e" * 16, HELLO)))
        while "e" * 16 not in [row.epoch for row in service.status().workers]:  # then everything before has been read
            await asyncio.to_thread(until_welcome, stranger)
        assert service.socket_counters.received > FRAMES_PER_TYPE
        tokens, end = await collect(stream)
        assert tokens == list(range(1, 800))
        assert (end.error, end.attempts) == (None, 1)
        assert service.bad_frames > FRAMES_PER_TYPE // 2
        service._core.check_invariants()
        stranger.close()
        await worker.stop()

    with_service(run, worker_timeout_s=10)


def test_bad_frames_from_the_workers_own_connection_are_ignored_too(with_service):
    async def run(service):
        rng = random.Random(3)
        worker = FakeWorker(service.address)
        stream = service.submit(request("live", max_tokens=500))
        await anext(stream)
        frames = [codec.from_worker.encode(FromWorker("d1", worker.key.epoch, body)) for body in BODIES]
        frames.append(codec.from_router.encode(codec.from_router.decode(router_frame())))
        for number in range(3000):
            worker.socket.send(mutated(rng.choice(frames), rng))
            if number % 50 == 0:
                await asyncio.sleep(0)
        tokens, end = await collect(stream)
        assert (tokens, end.error) == (list(range(1, 500)), None)
        await worker.stop()

    with_service(run, worker_timeout_s=10)


def router_frame():
    body = StartDecode("r", 1, b"", SamplingParams(), [ChoiceState(0)], 1.0)
    return codec.from_router.encode(FromRouter("0" * 16, 1, body))


def test_bug_in_a_deadline_ends_every_stream_too(with_service, monkeypatch):
    async def body(service):
        def explode():
            raise ZeroDivisionError("planted")

        monkeypatch.setattr(service._core, "tick", explode)
        _, end = await collect(service.submit(request()))
        assert isinstance(end.error, InternalError)
        with pytest.raises(Unavailable):
            service.submit(request("again"))
        with pytest.raises(ZeroDivisionError):
            await service.wait()

    with_service(body, unavailable_s=0.05)


def test_service_runs_on_uvloop(tmp_path):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        service = RouterService(RouterConfig(), f"ipc://{tmp_path}/r.sock")
        await service.start()
        worker = FakeWorker(service.address)
        tokens, end = await collect(service.submit(request(max_tokens=20)))
        assert (tokens, end.error) == (list(range(20)), None)
        await worker.stop()
        await service.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_lost_worker_error_reaches_the_caller_when_nothing_else_is_left(with_service):
    async def body(service):
        worker = FakeWorker(service.address)
        stream = service.submit(request(max_tokens=90_000))
        await anext(stream)
        await worker.stop()
        service.worker_exited("d0")
        _, end = await collect(stream)
        assert isinstance(end.error, Unavailable)
        assert "the last attempt failed: worker d0 was lost" in str(end.error)
        assert not isinstance(end.error, NodeLost)

    with_service(body, unavailable_s=0.2)
