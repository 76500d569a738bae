"""The connection between the router and a worker breaks while both live: what was under way in it is lost, the stream
is not.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from penstock.core.ids import WorkerKey
from penstock.protocol import codec
from penstock.protocol.messages import (
    Abort,
    Fingerprint,
    FromWorker,
    Heartbeat,
    Hello,
    Output,
    SampledToken,
    StartDecode,
    Tokens,
    Welcome,
    WorkerLoad,
    unpack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.protocol.sockets import WorkerSocket, identity_of
from penstock.router.config import RouterConfig
from penstock.router.interface import EndEvent, GenerateRequest
from penstock.router.service import RouterService

KEY = WorkerKey("d0", "0" * 16)
HELLO = Hello("both", 1, Fingerprint("tiny", "w", "float32", 1, 1, 4, 4, "block-major"), 100, 9000, 64, "/kv", ["shm"])
NUM_TOKENS = 300
BEAT_TURNS = 10  # 11 messages from beat to beat: a loss at every 17th or 40th message cannot meet beats alone


class ReconnectingWorker:
    """Counts upwards, a token a message. Every `lives_for` messages its socket closes and a new one connects; the
    messages of the time between are lost, as when the kernel drops a connection.
    """

    def __init__(self, address: str, lives_for: int) -> None:
        self.address, self.lives_for = address, lives_for
        self.socket = WorkerSocket(address, identity_of(KEY))
        self.said = self.reconnections = self.received = 0
        self.is_welcomed = False
        self.running: dict[tuple[str, int], list[int]] = {}  # attempt → next index, limit
        self.task = asyncio.create_task(self.run())

    def say(self, body: Hello | Heartbeat | Output) -> None:
        self.said += 1
        if self.said % self.lives_for == 0:
            self.socket.close()
            self.socket = WorkerSocket(self.address, identity_of(KEY))
            self.reconnections += 1
            return
        self.socket.send(codec.from_worker.encode(FromWorker(*KEY, body)))

    async def run(self) -> None:
        for turn in itertools.count():
            while (data := self.socket.recv()) is not None:
                self.take(data)
            if turn % BEAT_TURNS == 0:
                beat = Heartbeat(self.received, "ready", WorkerLoad(100, 100), list(self.running), [])
                self.say(beat if self.is_welcomed else HELLO)
            for key, state in list(self.running.items()):
                self.produce(key, state)
            await asyncio.sleep(0.001)

    def take(self, data: bytes) -> None:
        frame = codec.from_router.decode(data)
        self.received = max(self.received, frame.number)
        match frame.body:
            case Welcome():
                self.is_welcomed = True
            case StartDecode() as start:
                done = len(unpack_ids(start.choices[0].output_ids))
                self.running[(start.request_id, start.attempt)] = [done, start.params.max_tokens]
            case Abort() as abort:
                self.running.pop((abort.request_id, abort.attempt), None)
            case _:
                return

    def produce(self, key: tuple[str, int], state: list[int]) -> None:
        index, limit = state
        is_last = index + 1 == limit
        state[0] += 1
        if is_last:
            del self.running[key]
        self.say(Output([Tokens(*key, 0, index, (SampledToken(index),), "length" if is_last else None)]))

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.socket.close()


@pytest.mark.parametrize("lives_for", [17, 40])
def test_stream_over_a_connection_that_breaks_again_and_again_is_exact(tmp_path, lives_for):
    async def body():
        config = RouterConfig(worker_timeout_s=60, unacknowledged_s=0.3, max_attempts=100)
        service = RouterService(config, f"ipc://{tmp_path}/r.sock")
        await service.start()
        worker = ReconnectingWorker(service.address, lives_for)
        params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        stream = service.submit(GenerateRequest("r", [1, 2, 3], params, 120.0))
        events = [event async for event in stream]
        await worker.stop()
        await service.stop()
        end = events[-1]
        assert isinstance(end, EndEvent)
        assert end.error is None
        assert end.resumed > 0
        assert worker.reconnections > 3
        tokens = [token.token_id for event in events if not isinstance(event, EndEvent) for token in event.tokens]
        assert tokens == list(range(NUM_TOKENS))

    async def main():
        async with asyncio.timeout(120):
            await body()

    asyncio.run(main())
