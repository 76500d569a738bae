"""Virtual time passes at once, in order, and not while bytes are on their way."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from penstock.testing.virtual_loop import VirtualLoop, run_virtual


def test_an_hour_passes_at_once_and_exactly() -> None:
    async def main() -> float:
        await asyncio.sleep(3600.0)
        return asyncio.get_running_loop().time()

    began_s = time.monotonic()
    assert run_virtual(main()) == 3600.0
    assert time.monotonic() - began_s < 60


def test_timers_fire_in_order_at_their_times() -> None:
    fired: list[tuple[str, float]] = []

    async def one(name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        fired.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(one("c", 3.0), one("a", 1.0), one("b", 2.0))

    run_virtual(main())
    assert fired == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


def test_bytes_arrive_at_the_moment_they_are_written(tmp_path: Path) -> None:
    sent: list[float] = []
    came: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(100):
            await asyncio.sleep(0.5)
            sent.append(loop.time())
            writer.write(b"x" * 10_000)
        writer.close()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with await asyncio.start_unix_server(serve, tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            for _ in range(100):
                await reader.readexactly(10_000)
                came.append(loop.now())
            writer.close()
            await writer.wait_closed()

    run_virtual(main())
    assert came == sent
    assert came[-1] == pytest.approx(50.0)
