from __future__ import annotations

import pytest

from penstock.kvtransfer.effects import PeerLost, PeerUp

from .conftest import TRANSPORTS, Cluster


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("who", [0, 1], ids=["prefill", "decode"])
def test_dropped_links_are_lost_at_both_ends_and_made_anew(
    cluster: Cluster, transports: tuple[str, ...], who: int
) -> None:
    workers = cluster.pair(transports)
    workers[who].mesh.drop_links()
    for worker in workers:
        worker.wait_for(PeerLost)
    for worker in workers:
        worker.wait_for(PeerUp)
    assert [len(worker.mesh.linked()) for worker in workers] == [1, 1]


def test_dropping_without_links_does_nothing(cluster: Cluster) -> None:
    alone = cluster.worker("prefill", "prefill-0")
    alone.mesh.drop_links()
    assert alone.mesh.linked() == []
