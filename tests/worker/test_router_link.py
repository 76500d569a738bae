"""The thread that talks to the router tells what the loop does, above all that it does not turn."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

from penstock.core.ids import MAIN_ROUTER, WorkerKey
from penstock.kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from penstock.protocol import codec
from penstock.protocol.messages import FromRouter, Heartbeat, Hello, Welcome
from penstock.protocol.sockets import RouterSocket
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine
from penstock.worker.router_links import Inbox, Incarnation, RouterLink, RouterLinks
from penstock.worker.routers import MAX_ROUTERS, ROUTER_GONE_S, RouterGone
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


def links_in(folder: Path, clock: FakeClock, inbox: Inbox) -> RouterLinks:
    engine = FakeEngine()
    mesh = InprocMesh(KEY, "decode", engine.spec.fingerprint, engine.memory, inbox.put, InprocNetwork())
    who = Incarnation(KEY, "decode", f"ipc://{folder}/router.sock", heartbeat_s=0.01, runtime_dir=str(folder))
    return RouterLinks(who, hello(engine), inbox, mesh, clock, TurnWatch(clock))


async def welcome(router: RouterSocket, epoch: str) -> None:
    identity, _ = await router.recv()
    router.send(identity, codec.from_router.encode(FromRouter(epoch, 1, Welcome(), "what it likes")))


def test_router_that_comes_later_is_found_heard_under_its_own_name_and_missed(tmp_path: Path) -> None:
    async def run() -> None:
        clock, inbox = FakeClock(), Inbox()
        links = links_in(tmp_path, clock, inbox)
        try:
            router = RouterSocket(f"ipc://{tmp_path}/router-later.sock")
            clock.advance(1.0)
            links.look()
            await welcome(router, "b" * 16)
            frame = await asyncio.to_thread(inbox.get, timeout=30)
            assert isinstance(frame, FromRouter)
            assert (frame.router, frame.router_epoch) == ("later", "b" * 16)
            router.close()
            await asyncio.sleep(0.2)  # the thread notices that nobody is there
            clock.advance(ROUTER_GONE_S + 1.0)
            assert await asyncio.to_thread(inbox.get, timeout=30) == RouterGone("later")
            links.look()
            assert "later" not in links._links
        finally:
            links.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_routers_beyond_the_bound_are_not_served(tmp_path: Path) -> None:
    clock, inbox = FakeClock(), Inbox()
    links = links_in(tmp_path, clock, inbox)
    try:
        with ExitStack() as stack:
            for name in (*range(MAX_ROUTERS + 3), "No Name"):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(f"{tmp_path}/router-{name}.sock")
                listener.listen()
            clock.advance(1.0)
            links.look()
        assert len(links._links) == MAX_ROUTERS
        assert "No Name" not in links._links
        assert not links.is_broken
    finally:
        links.close()


def test_socket_that_a_killed_router_left_takes_no_place(tmp_path: Path) -> None:
    clock, inbox = FakeClock(), Inbox()
    links = links_in(tmp_path, clock, inbox)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{tmp_path}/router-dead.sock")
            listener.listen()
        clock.advance(1.0)
        links.look()
        assert list(links._links) == [MAIN_ROUTER]
    finally:
        links.close()
