from __future__ import annotations

import asyncio
import os
import stat
import threading
import time

import pytest
import zmq

from penstock.core.errors import ConfigError
from penstock.core.ids import WorkerKey
from penstock.protocol.sockets import RouterSocket, WorkerSocket, check_address, identity_of

KEY = WorkerKey("d0", "0123456789abcdef")


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/r.sock"


@pytest.mark.parametrize(
    "good", ["ipc:///tmp/x.sock", "tcp://127.0.0.1:5555", "tcp://127.3.2.1:*", "tcp://[::1]:5555", "tcp://localhost:80"]
)
def test_check_address_of_this_machine_passes(good):
    assert check_address(good) == good


@pytest.mark.parametrize(
    "bad", ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://[::]:1", "tcp://10.0.0.1:1", "tcp://example.org:1", "tcp://eth0:1"]
)
def test_check_address_reachable_from_outside_says_that_keys_are_needed(bad):
    with pytest.raises(ConfigError, match="needs keys"):
        check_address(bad)


@pytest.mark.parametrize(
    "bad", ["", "ipc://", "ipc://@abstract", "inproc://x", "/tmp/x", "udp://127.0.0.1:1", "ipc://" + "x" * 108]
)
def test_check_address_of_another_kind_is_refused(bad):
    with pytest.raises(ConfigError, match="address"):
        check_address(bad)


def test_sockets_refuse_an_address_outside_this_machine():
    with pytest.raises(ConfigError, match="needs keys"):
        WorkerSocket("tcp://10.0.0.1:5", identity_of(KEY))
    with pytest.raises(ConfigError, match="needs keys"):
        RouterSocket("tcp://0.0.0.0:*")


def test_worker_socket_refuses_an_identity_zeromq_cannot_carry(address):
    with pytest.raises(ConfigError, match="256 bytes"):
        WorkerSocket(address, "x" * 256)


def test_router_socket_refuses_a_folder_that_is_not_there(tmp_path):
    async def run():
        with pytest.raises(ConfigError, match="cannot listen"):
            RouterSocket(f"ipc://{tmp_path}/nowhere/r.sock")

    asyncio.run(run())


def test_frames_travel_both_ways_and_the_socket_file_is_private(address):
    async def run():
        router = RouterSocket(address)
        worker = WorkerSocket(address, identity_of(KEY))
        try:
            assert stat.S_IMODE(os.stat(address.removeprefix("ipc://")).st_mode) == 0o600
            assert worker.recv() is None
            assert worker.send(b"hello")
            identity, frame = await asyncio.wait_for(router.recv(), 5)
            assert (identity, frame) == (b"d0@0123456789abcdef", b"hello")
            assert router.send(identity, b"welcome")
            assert await asyncio.to_thread(worker.poll, 5)
            assert worker.recv() == b"welcome"
            assert worker.recv() is None
        finally:
            worker.close()
            worker.close()
            router.close()
            router.close()

    asyncio.run(run())


def test_tcp_port_chosen_by_the_system_is_told():
    async def run():
        router = RouterSocket("tcp://127.0.0.1:*")
        worker = WorkerSocket(router.address, "w@1")
        try:
            worker.send(b"x")
            assert (await asyncio.wait_for(router.recv(), 5))[1] == b"x"
        finally:
            worker.close()
            router.close()

    asyncio.run(run())


def test_send_to_nobody_is_dropped_and_counted(address):
    async def run():
        router = RouterSocket(address)
        try:
            assert not router.send(b"nobody@0", b"x")
            assert router.counters.dropped_unreachable == 1
        finally:
            router.close()

    asyncio.run(run())


def test_send_to_a_peer_that_never_reads_is_dropped_at_the_high_water_mark(address):
    async def run():
        router = RouterSocket(address, high_water_mark=10)
        worker = WorkerSocket(address, "w@1", high_water_mark=10)
        try:
            worker.send(b"x")
            await asyncio.wait_for(router.recv(), 5)
            sent = sum(router.send(b"w@1", bytes(65536)) for _ in range(500))
            assert 10 <= sent < 500
            assert router.counters.dropped_full == 500 - sent
            assert router.counters.sent == sent
        finally:
            worker.close()
            router.close()

    asyncio.run(run())


def test_worker_send_without_a_router_is_dropped_at_the_high_water_mark(address):
    worker = WorkerSocket(address, "w@1", high_water_mark=5)
    try:
        assert [worker.send(b"x") for _ in range(8)] == [True] * 5 + [False] * 3
        assert worker.counters.dropped_full == 3
    finally:
        worker.close()


def test_multipart_of_the_wrong_shape_is_counted_and_skipped(address):
    async def run():
        router = RouterSocket(address)
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(address)
            raw.send_multipart([b"a", b"b"])
            raw.send_multipart([b"", b"a", b"b"])
            raw.send(b"good")
            assert (await asyncio.wait_for(router.recv(), 5))[1] == b"good"
            assert router.counters.bad_frames == 2
        router.close()

    asyncio.run(run())


def test_reconnection_with_the_same_identity_takes_over(address):
    async def run():
        router = RouterSocket(address)
        old = WorkerSocket(address, "w@1")
        old.send(b"old")
        await asyncio.wait_for(router.recv(), 5)
        old.close()
        new = WorkerSocket(address, "w@1")
        try:
            new.send(b"new")
            await asyncio.wait_for(router.recv(), 5)
            router.send(b"w@1", b"for the new one")
            assert await asyncio.to_thread(new.poll, 5)
            assert new.recv() == b"for the new one"
        finally:
            new.close()
            router.close()

    asyncio.run(run())


def test_wake_ends_a_poll_from_another_thread(address):
    worker = WorkerSocket(address, "w@1")
    try:
        thread = threading.Thread(target=worker.wake)
        began = time.monotonic()
        thread.start()
        assert not worker.poll(30)
        thread.join()
        assert time.monotonic() - began < 10
        assert not worker.poll(0)
    finally:
        worker.close()
    worker.wake()


def test_many_wakes_do_not_block_and_count_once(address):
    worker = WorkerSocket(address, "w@1")
    try:
        for _ in range(100_000):
            worker.wake()
        assert not worker.poll(30)
        while worker.poll(0):
            pass
    finally:
        worker.close()


def test_last_frame_before_close_arrives(address):
    async def run():
        router = RouterSocket(address)
        worker = WorkerSocket(address, "w@1")
        worker.send(b"first")
        await asyncio.wait_for(router.recv(), 5)
        worker.send(b"goodbye")
        worker.close()
        assert (await asyncio.wait_for(router.recv(), 5))[1] == b"goodbye"
        router.close()

    asyncio.run(run())


def test_pid_of_a_peer_is_the_kernels_word_on_a_unix_socket(address):
    async def run():
        router = RouterSocket(address)
        worker = WorkerSocket(address, "w@1")
        try:
            assert router.pid_of(b"w@1") is None
            worker.send(b"x")
            await asyncio.wait_for(router.recv(), 5)
            assert router.pid_of(b"w@1") == os.getpid()
        finally:
            worker.close()
            router.close()

    asyncio.run(run())


def test_pid_of_a_peer_over_tcp_is_unknown():
    async def run():
        router = RouterSocket("tcp://127.0.0.1:*")
        worker = WorkerSocket(router.address, "w@1")
        try:
            worker.send(b"x")
            await asyncio.wait_for(router.recv(), 5)
            assert router.pid_of(b"w@1") is None
        finally:
            worker.close()
            router.close()

    asyncio.run(run())


def test_worker_socket_knows_whether_there_is_anybody(address):
    async def run():
        worker = WorkerSocket(address, identity_of(KEY))
        try:
            assert not worker.is_connected
            for _ in range(2):
                router = RouterSocket(address)
                await wait_for(lambda: worker.is_connected)
                router.close()
                await wait_for(lambda: not worker.is_connected)
        finally:
            worker.close()

    asyncio.run(run())


async def wait_for(is_true):
    for _ in range(500):
        if is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come")
