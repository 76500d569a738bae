"""TLS below a bulk link: who gets in, and what a stopped connection leaves in the memory."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.core.ids import SecureIds, new_ticket
from penstock.kvtransfer.effects import BlocksArrived, PeerUp
from penstock.kvtransfer.transports.pipes import TlsPipe
from penstock.kvtransfer.transports.tcp import TcpBulk
from penstock.kvtransfer.transports.tls import Tls, TlsFiles
from penstock.testing.socket_transports import tls_files
from penstock.tests.conftest import absent
from penstock.tests.kvtransfer.bulk_ends import make_certificates
from penstock.tests.kvtransfer.conftest import Cluster, accept, push, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        absent("tls: the openssl command is not installed")
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, "one", "other")
    make_certificates(folder, "stranger", authority="strangers")
    return folder


def shake_hands(dialer: Tls | ssl.SSLContext, listener: Tls) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Both ends of a connection; raises what the listener raises, else what the dialer raises.

    With TLS 1.3 a dialer that is refused hears of it only when it reads.
    """
    near, far = socket.socketpair()
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as undo:
        undo.callback(near.close)
        answer = thread.submit(listener.wrap, far, False, 5.0)
        try:
            mine = dialer.wrap(near, True, 5.0) if isinstance(dialer, Tls) else dialer.wrap_socket(near)
        except OSError:
            near.close()
            answer.result()
            raise
        undo.callback(mine.close)
        theirs = answer.result()
        undo.pop_all()
    return mine, theirs


@pytest.fixture
def pipes(folder: Path) -> Iterator[tuple[TlsPipe, TlsPipe]]:
    mine, theirs = shake_hands(Tls(tls_files(folder, "one")), Tls(tls_files(folder, "other")))
    assert mine.version() == theirs.version() == "TLSv1.3"
    left, right = TlsPipe(mine), TlsPipe(theirs)
    yield left, right
    left.close()
    right.close()


def test_certificate_of_another_authority_is_refused(folder: Path) -> None:
    stranger = TlsFiles(folder / "stranger.pem", folder / "stranger.key", folder / "strangers.pem")
    with pytest.raises(ssl.SSLError, match=r"certificate verify failed|unknown ca|UNKNOWN_CA"):
        shake_hands(Tls(stranger), Tls(tls_files(folder, "other")))


def test_peer_without_a_certificate_is_refused(folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(folder / "authority.pem")
    with pytest.raises(OSError, match=r"did not return a certificate"):
        shake_hands(context, Tls(tls_files(folder, "other")))


def test_older_tls_is_refused(folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_cert_chain(folder / "one.pem", folder / "one.key")
    context.load_verify_locations(folder / "authority.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError, match=r"(?i)protocol|version"):
        shake_hands(context, Tls(tls_files(folder, "other")))


@pytest.mark.parametrize("missing", ["certificate", "key", "authority"])
def test_missing_or_wrong_file_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    files = tls_files(folder, "one")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for path in (tmp_path / "absent.pem", wrong):
        with pytest.raises(ConfigError, match=f"TLS files: .*{missing} {path}"):
            Tls(
                TlsFiles(
                    **{**{name: getattr(files, name) for name in ("certificate", "key", "authority")}, missing: path}
                )
            )


def test_stopped_connection_gives_no_bare_bytes(pipes: tuple[TlsPipe, TlsPipe]) -> None:
    """`SSLSocket.shutdown` drops the TLS state, and a read that goes on takes encrypted bytes for ours."""
    left, right = pipes
    left.send([memoryview(b"a" * 100)])
    right.stop()
    memory = bytearray(100)
    with contextlib.suppress(OSError):
        right.receive([memoryview(memory)])
    assert set(memory) <= {0, ord("a")}


def test_stop_ends_a_read_that_waits(pipes: tuple[TlsPipe, TlsPipe]) -> None:
    _, right = pipes
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(right.receive, [memoryview(bytearray(1))])
        right.stop()
        with pytest.raises(OSError, match=r"closed|EOF"):
            waiting.result(10.0)


def test_link_over_tls_moves_blocks(cluster: Cluster, folder: Path) -> None:
    """The product's own link: its data connection is encrypted, and blocks arrive as they were sent."""
    prefill = cluster.worker("prefill", "prefill-0", ("tcp",), tls=tls_files(folder, "one"))
    decode = cluster.worker("decode", "decode-0", ("tcp",), tls=tls_files(folder, "other"))
    cluster.introduce()
    for worker in (prefill, decode):
        worker.wait_for(PeerUp)
    prefill.memory.buffer[:] = random.Random(5).randbytes(prefill.memory.nbytes)
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [4, 9])
    push(prefill, decode, ticket, [7, 2])
    event = decode.wait_for(BlocksArrived)
    assert isinstance(event, BlocksArrived)
    assert (event.ordinals, event.corrupt) == ((0, 1), ())
    assert decode.memory.block(4) == prefill.memory.block(7)
    assert decode.memory.block(9) == prefill.memory.block(2)
    (link,) = decode.mesh._links.values()
    bulk = link._bulk
    assert isinstance(bulk, TcpBulk)
    assert isinstance(bulk._pipe, TlsPipe)


def test_peer_without_tls_is_refused_on_both_sides(
    cluster: Cluster, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.worker("prefill", "prefill-0", ("tcp",), tls=tls_files(folder, "one"))
    cluster.worker("decode", "decode-0", ("tcp",))
    cluster.introduce()
    until(lambda: sum("tls differs" in record.getMessage() for record in caplog.records) >= 2)
    assert not any(worker.mesh.linked() for worker in cluster.workers)
