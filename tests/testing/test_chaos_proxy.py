"""The proxy between real processes does what it is told to, and counts it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from penstock.testing.chaos_proxy import ChaosProxy

Talk = Callable[[ChaosProxy, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _run(talk: Talk) -> None:
    """`talk` with a client's end of a connection, through the proxy, to a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def play() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        proxy = ChaosProxy(lambda: server.sockets[0].getsockname(), random.Random(1))
        await proxy.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            async with asyncio.timeout(10):
                await talk(proxy, reader, writer)
        finally:
            writer.transport.abort()
            await proxy.close()
            server.close()
            await server.wait_closed()

    asyncio.run(play())


def test_proxy_passes_bytes_both_ways() -> None:
    async def talk(proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert proxy.counts["bytes"] == 10

    _run(talk)


def test_proxy_silence_holds_bytes_back_for_as_long() -> None:
    async def talk(proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started = asyncio.get_running_loop().time()
        proxy.silence(0.3)
        writer.write(b"hello")
        await reader.readexactly(5)
        assert proxy.last_passed - started >= 0.3
        assert proxy.counts["held"]

    _run(talk)


def test_proxy_reset_breaks_both_ends_with_rst() -> None:
    async def talk(proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert proxy.counts["reset"] == 1

    _run(talk)


def test_proxy_bandwidth_and_loss_cost_time_that_is_measured() -> None:
    async def talk(proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.slow(1e6, 5.0)
        writer.write(bytes(10_000))
        await reader.readexactly(10_000)
        assert proxy.delayed_s >= 0.99 * 8 * proxy.counts["slowed_bytes"] / 1e6
        proxy.slow(1e6, 0.0)
        proxy.lose(0.05, 5.0)
        writer.write(b"x")
        await reader.readexactly(1)
        assert proxy.counts["lost_packets"] >= 1

    _run(talk)


def test_proxy_changes_repeats_and_cuts_the_next_chunk_only() -> None:
    async def talk(proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.change_next(lambda data: [(0.0, data.upper()), (0.1, data)], to_server=True)
        writer.write(b"abc")
        assert await reader.readexactly(6) == b"ABCabc"
        assert proxy.repeated_after_s >= 0.1
        writer.write(b"abc")
        assert await reader.readexactly(3) == b"abc"
        proxy.change_next(lambda data: None, to_server=True)
        writer.write(b"abcd")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(4)
        assert proxy.counts["changed"] == 2

    _run(talk)


def test_proxy_without_an_upstream_ends_the_connection() -> None:
    def nobody() -> tuple[str, int]:
        raise ValueError("nobody listens")

    async def play() -> None:
        proxy = ChaosProxy(nobody, random.Random(1))
        await proxy.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()
        await proxy.close()

    asyncio.run(play())
