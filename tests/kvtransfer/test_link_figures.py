"""What a link is measured to reach when it is made."""

from __future__ import annotations

import logging
import re

import pytest

from penstock.core.ids import SecureIds, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.bulk import Span
from penstock.kvtransfer.effects import BlocksArrived, PeerUp
from penstock.kvtransfer.figures import (
    MEASURED_BYTES,
    NO_FIGURES,
    LinkFigures,
    answer_measure,
    can_measure,
    measure,
    memcpy_gbps,
)
from penstock.kvtransfer.staging import StagingArea
from penstock.protocol.messages import KvHello

from .conftest import FINGERPRINT, TRANSPORTS, Cluster, accept, push
from .test_transports import Ends

STAGING_BYTES = 2 * MEASURED_BYTES


def hello_of(memory: KVMemory) -> KvHello:
    return KvHello(
        worker_id="prefill-0",
        epoch="a" * 16,
        peer_epoch=None,
        fingerprint=FINGERPRINT,
        transports=["tcp"],
        host_id="",
        num_blocks=memory.num_blocks,
        block_bytes=memory.block_bytes,
        nonce=bytes(16),
        staging_bytes=memory.staging_bytes,
    )


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_link_is_measured_once_it_is_made_and_the_log_has_the_figures(
    cluster: Cluster, transports: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = (
        cluster.worker(role, role, transports, staging_bytes=STAGING_BYTES) for role in ("prefill", "decode")
    )
    cluster.introduce()
    for worker in (prefill, decode):
        worker.wait_for(PeerUp)
    figures = r"([\d.]+) GB/s, (\d+) µs \(memcpy ([\d.]+) GB/s\)"
    line = re.compile(f"link to {prefill.key} uses {transports[0]} .*; {figures}")
    [found] = [match for record in caplog.records if (match := line.search(record.getMessage()))]
    assert all(float(figure) > 0 for figure in found.groups())
    ticket = new_ticket(SecureIds())
    prefill.memory.block(2)[:] = b"k" * prefill.memory.block_bytes
    accept(decode, prefill, ticket, [1])
    push(prefill, decode, ticket, [2])
    decode.wait_for(BlocksArrived)
    assert decode.memory.block(1) == prefill.memory.block(2)  # both ends are in step after the measurement


def test_worker_without_staging_memory_is_linked_unmeasured(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster.worker("prefill", "prefill", staging_bytes=STAGING_BYTES)
    decode = cluster.worker("decode", "decode")
    cluster.introduce()
    decode.wait_for(PeerUp)
    assert "not measured" in caplog.text


def test_measurement_needs_staging_memory_on_both_sides() -> None:
    enough, little = KVMemory(1, 1, 64, STAGING_BYTES), KVMemory(1, 1, 64, STAGING_BYTES - 1)
    assert can_measure(hello_of(enough), hello_of(enough))
    assert not can_measure(hello_of(enough), hello_of(little))
    assert not can_measure(hello_of(little), hello_of(enough))
    enough.close()
    little.close()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_measure_asks_for_small_and_large_pieces_and_gives_its_memory_back(kind: str) -> None:
    ends = Ends(kind, STAGING_BYTES)
    staging, asked = StagingArea(ends.target), list[int]()

    def ask(nbytes: int) -> None:
        asked.append(nbytes)
        if kind == "tcp" and nbytes == MEASURED_BYTES:
            ends.send_apart([Span(ends.source.nbytes, nbytes)])
        else:
            answer_measure(ends.sender, ends.source, nbytes)

    figures = measure(ends.receiver, staging, hello_of(ends.source), ask)
    assert set(asked) == {24 << 10, MEASURED_BYTES}
    assert min(figures.gbps, figures.latency_us, figures.memcpy_gbps) > 0
    target = staging.take(MEASURED_BYTES)
    assert ends.target.region[target.offset : target.offset + 4096] == ends.source.region[ends.source.nbytes :][:4096]
    assert not any(ends.target.buffer)
    ends.close()


def test_measure_without_room_in_staging_gives_no_figures() -> None:
    """Other links use it all: this one works all the same."""
    ends = Ends("shm", STAGING_BYTES)
    staging = StagingArea(ends.target)
    staging.take(STAGING_BYTES - MEASURED_BYTES)

    def ask(nbytes: int) -> None:
        raise AssertionError("nothing to measure with")

    assert measure(ends.receiver, staging, hello_of(ends.source), ask) == NO_FIGURES
    ends.close()


def test_figures_read_as_one_line() -> None:
    assert str(LinkFigures(1.26, 41.4, 9.99)) == "1.3 GB/s, 41 µs (memcpy 10.0 GB/s)"
    assert str(NO_FIGURES) == "not measured"
    assert memcpy_gbps(1 << 16, 1) > 0
