"""What the front tells the supervisor over its stdout, one JSON document a line, and what it hears on its stdin."""

from __future__ import annotations

import re

import msgspec


class Listening(msgspec.Struct, frozen=True, tag=True):
    """The gateway takes connections here."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class WorkerChanged(msgspec.Struct, frozen=True, tag=True):
    """A worker is new, has a new state, or a link of it came or went."""

    worker_id: str
    role: str
    pid: int
    epoch: str
    state: str
    total_blocks: int
    dtype: str = ""
    links: dict[str, str] = {}  # peer → transport


class ClusterReady(msgspec.Struct, frozen=True, tag=True):
    """Every worker of the topology can take requests. Sent again each time that this becomes true."""

    model: str
    block_size: int
    bytes_per_token: int
    max_sequence_tokens: int


Report = Listening | WorkerChanged | ClusterReady

_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
_EXITED = re.compile(r"exited ([\w-]{1,64}) (\d{1,10})")


def encode_report(report: Report) -> str:
    return msgspec.json.encode(report).decode()


def decode_report(line: str) -> Report | None:
    """The report in `line`, or None for a line that is something else (a stray print)."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None


def exited_line(worker_id: str, pid: int) -> str:
    """The supervisor's word that a worker's process has ended."""
    return f"exited {worker_id} {pid}"


def parse_exited(line: str) -> tuple[str, int] | None:
    """(worker_id, pid) of an `exited` line; None for anything else."""
    found = _EXITED.fullmatch(line.strip())
    return (found[1], int(found[2])) if found else None
