"""A TCP proxy between two processes that loses, delays, spoils and repeats bytes, and can break all connections.

One loop, one listening port, one upstream. What happened is counted from the bytes themselves, so that a fault which
did not happen is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

CHUNK_BYTES = 1 << 16
PACKET_BYTES = 1460
RETRANSMIT_S = 0.2  # first timeout of a TCP sender on Linux
LAST_BYTES_S = 0.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST

Address = tuple[str, int]
Change = Callable[[bytes], list[tuple[float, bytes]] | None]  # chunk → (delay, bytes) …; None: end the connection here


@dataclass(slots=True, eq=False)
class _Connection:
    """Both halves of one connection that goes through."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter

    def reset(self) -> None:
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class ChaosProxy:
    """`upstream` is asked anew for each connection. Faults hold for all connections, both ways, until they are over.

    counts: connections, bytes, held, reset, slowed_bytes, lost_packets, changed
    """

    def __init__(self, upstream: Callable[[], Address], rng: random.Random) -> None:
        self._upstream, self._rng = upstream, rng
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._silent_until = self._slow_until = self._lossy_until = 0.0
        self._bits_per_s, self._loss = 0.0, 0.0
        self._change: tuple[Change, bool] | None = None
        self.counts: Counter[str] = Counter()
        self.last_passed = 0.0
        self.delayed_s = 0.0
        self.repeated_after_s = 0.0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End everything and wait for it."""
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    # ---- faults ----

    def silence(self, seconds: float) -> None:
        """Nothing passes for so long; what is sent meanwhile comes afterwards, if its connection still lives."""
        self._silent_until = asyncio.get_running_loop().time() + seconds

    def slow(self, bits_per_s: float, seconds: float) -> None:
        self._bits_per_s, self._slow_until = bits_per_s, asyncio.get_running_loop().time() + seconds

    def lose(self, probability: float, seconds: float) -> None:
        """Packets are lost and sent again later; the next one for certain."""
        self._loss, self._lossy_until = probability, asyncio.get_running_loop().time() + seconds
        self.counts["lost_packets"] = 0

    def reset_all(self) -> None:
        """RST to both ends of every connection."""
        for connection in list(self._connections):
            connection.reset()
            self.counts["reset"] += 1

    def change_next(self, change: Change, *, to_server: bool) -> None:
        """`change` decides about the next chunk in one direction; an empty list lets it pass, and asks for the next."""
        self._change = (change, to_server)

    # ---- bytes ----

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream())
            connection = _Connection(writer, up_writer)
            self._connections.add(connection)
            self.counts["connections"] += 1
            await self._carry(connection, reader, up_reader)
            self._connections.discard(connection)
            up_writer.transport.abort()
        except (OSError, ValueError):
            pass  # nobody listens there now: the caller sees its connection end
        finally:
            writer.transport.abort()
            self._handlers.discard(task)

    async def _carry(
        self, connection: _Connection, from_client: asyncio.StreamReader, from_server: asyncio.StreamReader
    ) -> None:
        """Until either half ends; what is under way in the other then has a moment to arrive."""
        pumps = {
            asyncio.create_task(self._pump(connection, from_client, connection.server, to_server=True)),
            asyncio.create_task(self._pump(connection, from_server, connection.client, to_server=False)),
        }
        self._pumps |= pumps
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(pumps, timeout=LAST_BYTES_S)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._pumps -= pumps

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                parts = self._changed(data, to_server)
                if parts is None:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    connection.reset()
                    return
                started = asyncio.get_running_loop().time()
                for delay_s, part in parts:
                    if delay_s:
                        await asyncio.sleep(delay_s)
                    await self._wait_for_link(part)
                    writer.write(part)
                    await writer.drain()
                    self.counts["bytes"] += len(part)
                    self.last_passed = asyncio.get_running_loop().time()
                if len(parts) > 1:
                    self.repeated_after_s = self.last_passed - started

    def _changed(self, data: bytes, to_server: bool) -> list[tuple[float, bytes]] | None:
        if self._change is None or self._change[1] is not to_server:
            return [(0.0, data)]
        parts = self._change[0](data)
        if parts == []:
            return [(0.0, data)]
        self._change = None
        self.counts["changed"] += 1
        return parts

    async def _wait_for_link(self, data: bytes) -> None:
        """As long as the state of the link makes these bytes wait."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        if started < self._slow_until:
            await asyncio.sleep(8 * len(data) / self._bits_per_s)
            self.counts["slowed_bytes"] += len(data)
            self.delayed_s += loop.time() - started
        if started < self._lossy_until:
            await asyncio.sleep(sum(self._late_s() for _ in range(-(-len(data) // PACKET_BYTES))))
        while (left_s := self._silent_until - loop.time()) > 0:
            self.counts["held"] += 1
            await asyncio.sleep(left_s)

    def _late_s(self) -> float:
        late_s, timeout_s = 0.0, RETRANSMIT_S
        while self.counts["lost_packets"] == 0 or self._rng.random() < self._loss:
            self.counts["lost_packets"] += 1
            late_s, timeout_s = late_s + timeout_s, 2 * timeout_s
        self.delayed_s += late_s
        return late_s
