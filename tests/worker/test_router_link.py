"""The thread that talks to the router tells what the loop does, above all that it does not turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

from penstock.core.ids import WorkerKey
from penstock.kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from penstock.protocol import codec
from penstock.protocol.messages import FromRouter, Heartbeat, Hello, Welcome
from penstock.protocol.sockets import RouterSocket
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine
from penstock.worker.router_links import Inbox, Incarnation, RouterLink
from penstock.worker.turn_watch import TurnWatch

KEY = WorkerKey("decode-0", "0" * 16)


def hello(engine: FakeEngine) -> Hello:
    return Hello("decode", 1, engine.spec.fingerprint, 8, 100, 64, "/kv", ["inproc"])


async def beat_of(router: RouterSocket, state: str) -> Heartbeat:
    """The next heartbeat that reports `state`; whatever else comes before it is skipped."""
    while True:
        body = codec.from_worker.decode((await router.recv())[1]).body
        if isinstance(body, Heartbeat) and body.state == state:
            return body


def test_heartbeats_of_a_loop_that_hangs_say_stalled_until_it_turns_again(tmp_path: Path) -> None:
    async def run() -> None:
        clock, engine, inbox = FakeClock(), FakeEngine(), Inbox()
        router = RouterSocket(f"ipc://{tmp_path}/r.sock")
        who = Incarnation(KEY, "decode", router.address, heartbeat_s=0.01)
        turns = TurnWatch(clock, max_step_s=5.0)
        mesh = InprocMesh(KEY, "decode", engine.spec.fingerprint, engine.memory, inbox.put, InprocNetwork())
        link = RouterLink(who, hello(engine), inbox, mesh, clock, turns)
        try:
            identity, _ = await router.recv()
            router.send(identity, codec.from_router.encode(FromRouter("a" * 16, 1, Welcome())))
            await asyncio.to_thread(inbox.get, timeout=30)
            clock.advance(4.0)
            assert (await beat_of(router, "starting")).turn_age_s == 4.0
            clock.advance(2.0)
            assert (await beat_of(router, "stalled")).turn_age_s == 6.0
            turns.turn()
            clock.advance(1.0)
            assert (await beat_of(router, "starting")).turn_age_s == 1.0
        finally:
            link.close()
            router.close()

    asyncio.run(asyncio.wait_for(run(), 60))
