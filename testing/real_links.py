"""Faults done to the bytes between real processes, in the proxies that these go through."""

from __future__ import annotations

import asyncio
import random
import time

from .chaos_proxy import RETRANSMIT_S, ChaosProxy
from .fault import SLACK_S, Aim, Target
from .fault_frames import BITS_PER_S, LATE_S, LOSS
from .real_cluster import RealCluster
from .real_fault import RealFault

SILENCE_S = 2.2  # longer than every time-out of a worker, a link and a lease
BAD_LINK_S = 1.5


class _LinkFault(RealFault):
    """`proxy` is what the bytes of the link go through; for a transfer link all links of that prefill worker do."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self.is_transfer = aim.target is Target.TRANSFER
        self.proxy: ChaosProxy = (
            cluster.transfer[aim.prefill] if self.is_transfer else cluster.workers[aim.ends[1]].control
        )
        self.before = self.proxy.counts.copy()

    def more(self, count: str) -> int:
        """What has been counted since the moment."""
        return self.proxy.counts[count] - self.before[count]


class RealSilence(_LinkFault):
    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._passed_last = time.monotonic()
        asyncio.get_running_loop().call_later(SILENCE_S - SLACK_S, self._look)

    @property
    def lasts_s(self) -> float:
        return SILENCE_S + SLACK_S

    def strike(self) -> None:
        self.proxy.silence(SILENCE_S)

    def _look(self) -> None:
        self._passed_last = self.proxy.last_passed

    def verify(self) -> str:
        if self._passed_last > self.since + SLACK_S:
            return f"bytes passed {self._passed_last - self.since:.3f} s into the silence"
        return "" if self.more("held") else "no byte was held up"


class _BadLink(_LinkFault):
    """For a while, bytes arrive late."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._delayed_before = self.proxy.delayed_s

    @property
    def lasts_s(self) -> float:
        return BAD_LINK_S

    @property
    def delayed_s(self) -> float:
        """How late bytes have been since the moment, all together."""
        return self.proxy.delayed_s - self._delayed_before


class RealBandwidth(_BadLink):
    def strike(self) -> None:
        self.proxy.slow(BITS_PER_S, BAD_LINK_S)

    def verify(self) -> str:
        nbytes = self.more("slowed_bytes")
        if not nbytes:
            return "nothing passed the slow link"
        least_s = 0.99 * 8 * nbytes / BITS_PER_S
        if self.delayed_s < least_s:
            return f"{nbytes} bytes took {self.delayed_s:.4f} s, at least {least_s:.4f} s are due"
        return ""


class RealLoss(_BadLink):
    def strike(self) -> None:
        self.proxy.lose(LOSS, BAD_LINK_S)

    def verify(self) -> str:
        return "" if self.delayed_s >= 0.99 * RETRANSMIT_S else f"packets were late by {self.delayed_s:.3f} s only"


class _Spoiled(_LinkFault):
    """One chunk of bytes is changed. On the control link that is a frame from a worker to the router."""

    def strike(self) -> None:
        to_server = not self.is_transfer or self.rng.random() < 0.5
        self.proxy.change_next(self._change_chunk, to_server=to_server)

    def _change_chunk(self, data: bytes) -> list[tuple[float, bytes]] | None:
        is_dull = not self.is_transfer and (b"Heartbeat" in data or data[0] > 2)
        return [] if is_dull else self.change(data)

    def change(self, data: bytes) -> list[tuple[float, bytes]] | None:
        """The parts that travel instead, with what to wait before each; None to end the connection in the middle."""
        return [(0.0, data)]

    @property
    def is_pending(self) -> bool:
        return not self.more("changed")

    def _why_link_lives(self) -> str:
        """Between workers whatever is not as it was sent ends the link, or is found by a block's digest."""
        log = self.logged(*self.cluster.workers)
        is_noticed = "is over" in log or "differ from their digest" in log
        return "" if is_noticed else "the link went on as if nothing had been"


class RealCorrupt(_Spoiled):
    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._bad_before = cluster.router.bad_frames

    def change(self, data: bytes) -> list[tuple[float, bytes]] | None:
        spoiled = bytearray(data)
        # ZeroMQ: flags, a length of one byte (of eight with flag 2), the body; its first byte says what it is.
        position = len(data) // 2 if self.is_transfer else 9 if data[0] & 2 else 2
        spoiled[position] ^= 0xFF
        return [(0.0, bytes(spoiled))]

    def verify(self) -> str:
        if not self.more("changed"):
            return "no byte was changed"
        if self.is_transfer:
            text = self.logged(*self.cluster.workers)
            return "" if "differ" in text or "checksum" in text else self._why_link_lives()
        return "" if self.cluster.router.bad_frames > self._bad_before else "the router refused no frame"


class RealTruncated(_Spoiled):
    def change(self, data: bytes) -> list[tuple[float, bytes]] | None:
        return None

    def verify(self) -> str:
        if not self.more("changed"):
            return "no frame was cut short"
        if not self.more("connections"):
            return "the connection was not made again"
        return self._why_link_lives() if self.is_transfer else ""


class RealRepeated(_Spoiled):
    """On the control link the frame arrives twice; between workers the second one's MAC is wrong by its number."""

    def change(self, data: bytes) -> list[tuple[float, bytes]] | None:
        return [(0.0, data), (LATE_S, data)]

    @property
    def lasts_s(self) -> float:
        return LATE_S + SLACK_S

    def verify(self) -> str:
        if not self.more("changed") or self.proxy.repeated_after_s < 0.99 * LATE_S:
            return f"no frame came again after {LATE_S:g} s"
        return self._why_link_lives() if self.is_transfer else ""
