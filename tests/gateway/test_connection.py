from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web

from penstock.gateway.config import Limits
from penstock.gateway.connection import Connection


class FullTransport(asyncio.Transport):
    """Holds `sizes` bytes at one look after the other, the last size from then on."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self._sizes = list(sizes)
        self.num_looks = 0
        self.aborted = asyncio.Event()
        self.empty = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        self.num_looks += 1
        if len(self._sizes) > 1:
            return self._sizes.pop(0)
        self.empty.set()
        return self._sizes[0]

    def close(self) -> None:
        """Nothing to close."""

    def abort(self) -> None:
        self.aborted.set()


async def _connection(transport: asyncio.Transport, cuts: list[bool]) -> Connection:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    server = web.Server(handler)
    limits = Limits(write_timeout_s=0.001)
    connection = Connection(server, limits, lambda: cuts.append(True), asyncio.get_running_loop())
    connection.transport = transport
    return connection


def test_connection_that_takes_nothing_is_cut() -> None:
    async def run() -> None:
        transport, cuts = FullTransport([100, 100]), list[bool]()
        connection = await _connection(transport, cuts)
        connection.pause_writing()
        await asyncio.wait_for(transport.aborted.wait(), 10)
        assert cuts == [True]

    asyncio.run(run())


def test_connection_that_takes_a_little_lives_until_it_stops() -> None:
    async def run() -> None:
        transport, cuts = FullTransport([100, 90, 90, 80, 80, 80]), list[bool]()
        connection = await _connection(transport, cuts)
        connection.pause_writing()
        await asyncio.wait_for(transport.aborted.wait(), 10)
        assert transport.num_looks == 6  # one at the pause, two at each progress, one when it stood still

    asyncio.run(run())


@pytest.mark.parametrize("way_out", ["resume_writing", "connection_lost"])
def test_connection_that_goes_on_is_not_cut(way_out: str) -> None:
    async def run() -> None:
        transport, cuts = FullTransport([100]), list[bool]()
        connection = await _connection(transport, cuts)
        connection.pause_writing()
        if way_out == "resume_writing":
            connection.resume_writing()
        else:
            connection.connection_lost(None)
        await asyncio.sleep(0.01)  # ten times the bound
        assert not transport.aborted.is_set()
        assert cuts == []

    asyncio.run(run())
