"""Which transports there are, and which one two workers take."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from penstock.core.errors import TransferFailed
from penstock.core.ids import WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.bulk import MAX_OFFER_BYTES, Span, Unusable
from penstock.kvtransfer.transports import catalog
from penstock.kvtransfer.transports.library import library_errors, require_inside, use_ucx_of
from penstock.kvtransfer.transports.runs import chunks, total_bytes

ME = WorkerKey("w", "0" * 16)
EVERYTHING = catalog.ALL


@pytest.mark.parametrize(
    ("mine", "theirs", "same_host", "kind", "name", "why"),
    [
        (("shm", "tcp"), ("shm", "tcp"), True, "cpu", "shm", "best for cpu memory"),
        (("tcp", "nixl", "shm"), EVERYTHING, True, "cpu", "shm", "best for cpu memory"),
        (("shm", "nixl", "tcp"), EVERYTHING, False, "cpu", "nixl", "no shm: the peer is on another host"),
        (("shm", "nixl", "tcp"), ("shm", "tcp"), False, "cpu", "tcp", "no nixl: the peer does not allow it"),
        (("cuda_ipc", "nixl", "tcp"), EVERYTHING, True, "cuda", "cuda_ipc", "best for cuda memory"),
        (("cuda_ipc", "nixl", "tcp"), EVERYTHING, False, "cuda", "nixl", "no cuda_ipc: the peer is on another host"),
        (("ucx",), EVERYTHING, True, "cpu", "ucx", "asked for by name"),
        (("tcp",), EVERYTHING, True, "cpu", "tcp", "asked for by name"),
        (("shm", "gloo", "tcp"), EVERYTHING, True, "cpu", "gloo", "asked for by name"),
        (("ucx", "tcp"), ("shm", "tcp"), True, "cpu", "tcp", "no ucx: the peer does not allow it"),
        (("nccl",), ("shm", "tcp"), True, "cuda", "", "no nccl: the peer does not allow it"),
        (("shm",), ("shm",), False, "cpu", "", "no shm: the peer is on another host"),
        ((), EVERYTHING, True, "cpu", "", "no transport is allowed here"),
    ],
)
def test_choice_names_the_best_common_transport_and_the_reason(
    mine: tuple[str, ...],
    theirs: tuple[str, ...],
    same_host: bool,
    kind: catalog.MemoryKind,
    name: str,
    why: str,
) -> None:
    chosen, reason = catalog.choose(mine, theirs, same_host, kind)
    assert chosen == name
    assert why in reason


def test_nobody_gets_a_library_that_was_not_asked_for() -> None:
    for kind in ("cpu", "cuda"):
        assert not {"ucx", "gloo", "nccl"} & set(catalog.PREFERENCE[kind])


@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("nixl", "pip install --no-deps nixl-cu12"),
        ("ucx", r"pip install 'penstock\[ucx\]'"),
        ("nccl", r"pip install 'penstock\[gpu\]'"),
        ("cuda_ipc", r"pip install 'penstock\[gpu\]'"),
        ("carrier-pigeon", "choose from shm, tcp"),
    ],
)
def test_missing_library_is_named_with_what_helps(name: str, help: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    memory = KVMemory(1, 1, 4096)
    with pytest.raises(Unusable, match=help):
        catalog.open_transport(name, memory, ME)
    memory.close()


@pytest.mark.parametrize("name", ["shm", "tcp", "gloo"])
def test_what_needs_no_extra_is_available(name: str) -> None:
    assert catalog.available(name) is None


def test_transport_without_a_library_is_not_opened() -> None:
    memory = KVMemory(1, 1, 4096)
    with pytest.raises(Unusable, match="the handshake makes its links"):
        catalog.open_transport("tcp", memory, ME)
    memory.close()


@pytest.mark.parametrize(("name", "help"), [("cuda_ipc", "name shm or tcp"), ("nccl", "CUDA is absent|on the CPU")])
def test_gpu_transport_refuses_memory_on_the_cpu(name: str, help: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    memory = KVMemory(1, 1, 4096)
    with pytest.raises(Unusable, match=help):
        catalog.open_transport(name, memory, ME)
    memory.close()


@pytest.mark.parametrize(("loaded", "wanted"), [("ucxx", "nixl"), ("nixl_cu12", "ucx")])
def test_second_ucx_in_a_process_is_refused(loaded: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ucxx", "nixl", "nixl_cu12"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    use_ucx_of(wanted)
    monkeypatch.setitem(sys.modules, loaded, ModuleType(loaded))
    with pytest.raises(Unusable, match="one process can use one"):
        use_ucx_of(wanted)


def test_library_error_becomes_one_of_ours_and_ours_stays() -> None:
    with pytest.raises(TransferFailed, match="reading: KeyError: 'x'"), library_errors("reading"):
        raise KeyError("x")
    with pytest.raises(Unusable, match="because"), library_errors("reading"):
        raise Unusable("because")
    with pytest.raises(ConnectionResetError), library_errors("reading"):
        raise ConnectionResetError


@pytest.mark.parametrize("span", [Span(-1, 2), Span(0, 0), Span(0, 11), Span(10, 1), Span(3, -1)])
def test_span_outside_the_memory_is_refused(span: Span) -> None:
    require_inside([Span(0, 10), Span(9, 1)], 10, "our")
    with pytest.raises(TransferFailed, match="outside our memory of 10 bytes"):
        require_inside([span], 10, "our")


def test_chunks_hold_the_same_bytes_in_the_same_order() -> None:
    spans = [Span(0, 5), Span(5, 5), Span(40, 1), Span(20, 9)]
    cut = list(chunks(spans, 4))
    assert [byte for chunk in cut for start, nbytes in chunk for byte in range(start, start + nbytes)] == [
        *range(10),
        40,
        *range(20, 29),
    ]
    assert [total_bytes(chunk) for chunk in cut] == [4] * 5
    assert max(map(len, chunks(spans, 100, 2))) == 2
    assert MAX_OFFER_BYTES >= 24 << 10
