"""Ends of bulk links in processes of their own, and what their memories must hold: for `test_bulk.py`."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import xxhash

from penstock.kvtransfer.transports.catalog import ALL, available
from penstock.testing.bulk_process import BulkError, BulkProcess, Spans
from penstock.tests.conftest import absent

NBYTES = 12 << 20
SOURCE_SEED, TARGET_SEED = 1, 2

DESTINATIONS = ("d", "y")  # names of the workers that receive

_session, _epoch, _link = count(1), count(1), count(1)


@dataclass(frozen=True)
class Kind:
    """A transport as it is tested. `waits`: a receive waits for the source to send; otherwise it reads by itself."""

    label: str
    transport: str
    settings: Mapping[str, str] = field(default_factory=dict)
    waits: bool = True
    devices: tuple[int, int] | None = None  # numbers of the GPUs of source and destination

    def __str__(self) -> str:
        return self.label


KINDS = [
    Kind("shm", "shm", waits=False),
    Kind("tcp", "tcp"),
    Kind("tls", "tls"),
    Kind("nixl", "nixl", waits=False),
    # UCX answers reads over TCP in software, so here a frozen source holds the destination up.
    Kind("nixl-over-tcp", "nixl", {"UCX_TLS": "tcp,self"}, waits=False),
    Kind("ucx", "ucx"),
    Kind("gloo", "gloo"),
]
_CUDA = {"UCX_TLS": "tcp,cma,self,cuda_copy,cuda_ipc"}
GPU_KINDS = [
    Kind("cuda_ipc", "cuda_ipc", waits=False, devices=(0, 0)),
    Kind("nixl-on-gpu", "nixl", _CUDA, waits=False, devices=(0, 0)),
    Kind("nccl", "nccl", devices=(0, 1)),  # one GPU cannot hold both ranks
]


def lacks_gpus(kind: Kind) -> str:
    """Why this transport cannot be tested here; empty when it can."""
    needed = 0 if kind.devices is None else 1 + max(kind.devices)
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return "" if found >= needed else f"{kind}: needs {needed} CUDA device(s), this machine has {found}"


def require(kind: Kind) -> None:
    """Skip, or fail where everything is required, when this transport cannot be used here."""
    if kind.transport in ALL and (obstacle := available(kind.transport)):
        absent(f"{kind.transport}: {obstacle}")
    if kind.transport == "tls" and shutil.which("openssl") is None:
        absent("tls: the openssl command is not installed")


@dataclass
class Worker:
    """One end: a name in a process, and the bytes that its memory should hold."""

    name: str
    epoch: str
    process: BulkProcess
    offer: str
    expected: bytearray

    def fill(self, seed: int) -> None:
        self.process.ask("fill", end=self.name, seed=seed)
        self.expected = bytearray(random.Random(seed).randbytes(NBYTES))

    def holds(self, expected: bytes | bytearray) -> bool:
        return bool(self.process.ask("digest", end=self.name) == xxhash.xxh3_64_hexdigest(expected))

    @property
    def is_as_expected(self) -> bool:
        return self.holds(self.expected)


def open_worker(kind: Kind, process: BulkProcess, name: str, seed: int) -> Worker:
    epoch = f"{next(_epoch):016x}"
    device = None if kind.devices is None else kind.devices[name in DESTINATIONS]
    offer = process.ask("open", end=name, transport=kind.transport, nbytes=NBYTES, epoch=epoch, device=device)
    worker = Worker(name, epoch, process, offer, bytearray())
    worker.fill(seed)
    return worker


@dataclass
class Pair:
    """A link from `source` to `destination`. `move` keeps account of what must be where."""

    source: Worker
    destination: Worker
    link: str

    def name_for(self, worker: Worker) -> str:
        """Both ends may be in one process."""
        return f"{self.link}-{worker.name}"

    def start(self, worker: Worker, what: str, spans: Spans, target: Spans | None = None, wanted: int = 1 << 30) -> str:
        """A job of that worker: send, receive or discard."""
        return worker.process.start(self.name_for(worker), what, spans, target, wanted)

    def send(self, spans: Spans) -> str:
        return self.start(self.source, "send", spans)

    def receive(self, spans: Spans, target: Spans | None = None, wanted: int = 1 << 30) -> str:
        return self.start(self.destination, "receive", spans, target, wanted)

    def move(self, spans: Spans, target: Spans) -> tuple[str, str]:
        """Start one push; both jobs are to be waited for."""
        data = b"".join(self.source.expected[start : start + nbytes] for start, nbytes in spans)
        place(self.destination.expected, target, data)
        return self.send(spans), self.receive(spans, target)

    def finish(self, jobs: tuple[str, str]) -> None:
        self.source.process.wait(jobs[0])
        self.destination.process.wait(jobs[1])

    def stop(self, worker: Worker) -> float:
        """Seconds until that end's threads were free."""
        return float(worker.process.ask("stop", link=self.name_for(worker)))

    def close(self, worker: Worker) -> None:
        worker.process.ask("close", link=self.name_for(worker))


def place(memory: bytearray, target: Spans, data: bytes) -> None:
    at = 0
    for start, nbytes in target:
        memory[start : start + nbytes] = data[at : at + nbytes]
        at += nbytes


@contextlib.contextmanager
def linked(source: Worker, destination: Worker) -> Iterator[Pair]:
    """The destination dials, as decode does."""
    pair = Pair(source, destination, f"link-{next(_link)}")
    session = f"{next(_session):032x}"
    jobs = [
        connect(worker, peer, pair.name_for(worker), session, is_dialer=worker is destination)
        for worker, peer in ((source, destination), (destination, source))
    ]
    for worker, job in zip((source, destination), jobs, strict=True):
        worker.process.wait(job)
    try:
        yield pair
    finally:
        for worker in (source, destination):
            with contextlib.suppress(BulkError, OSError):
                pair.close(worker)


def connect(worker: Worker, peer: Worker, link: str, session: str, is_dialer: bool, **arguments: object) -> str:
    """Start to connect; the job's name."""
    job = worker.process.new_job()
    facts = {"end": worker.name, "link": link, "job": job, "peer": (peer.name, peer.epoch), "session": session}
    worker.process.ask("connect", **({**facts, "is_dialer": is_dialer, "offer": peer.offer} | arguments))
    return job


def draw_spans(rng: random.Random, nbytes: int) -> list[tuple[int, int]]:
    """Spans of `nbytes` together, none overlapping another: adjacent, scattered, tiny and large ones, in any order."""
    sizes: list[int] = []
    while (left := nbytes - sum(sizes)) > 0:
        sizes.append(min(left, rng.choice([1, 7, 24 << 10, 64 << 10, 24 << 10, 1 << 20, 3 << 20])))
    gap = NBYTES - nbytes
    spans, at = [], 0
    for size in sizes:
        skipped = rng.choice([0, 0, rng.randint(0, gap // len(sizes))])
        spans.append((at + skipped, size))
        at += skipped + size
    rng.shuffle(spans)
    return spans


def make_certificates(folder: Path, *names: str, authority: str = "authority") -> None:
    """Throw-away keys and certificates for workers, signed by an authority of this test."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        *("req", "-x509", *new_key, "-days", "1", "-subj", f"/CN={authority}"),
        *("-keyout", f"{authority}.key", "-out", f"{authority}.pem"),
    )
    for name in names:
        openssl("req", *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key"),
            *("-CAcreateserial", "-days", "1", "-out", f"{name}.pem"),
        )
