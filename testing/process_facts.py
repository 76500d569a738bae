"""What Linux tells of a process from outside: whether it runs, what it holds open, which shared memory it maps."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What may not grow. `pools` counts the different memfds that are mapped: KV pools, its own and those of peers."""

    fds: int
    sockets: int
    pools: int
    threads: int

    def growth(self, since: ProcessFacts) -> dict[str, int]:
        """What there is more of now than there was then. A library's team of threads grows to the number of cores when
        it is first needed.
        """
        before = asdict(since)
        before["threads"] += os.cpu_count() or 1
        return {name: now - before[name] for name, now in asdict(self).items() if now > before[name]}


def state_of(pid: int) -> str:
    """The letter of its state (R, S, D, T, Z, …); empty when the process is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def is_gone(pid: int) -> bool:
    """Nothing of it runs any more; a zombie that waits for its parent counts as gone."""
    return state_of(pid) in ("", "Z", "X")


def facts_of(pid: int) -> ProcessFacts:
    """Raises OSError when the process is gone."""
    folder = Path("/proc", str(pid))
    targets = [_target(entry) for entry in os.scandir(folder / "fd")]
    maps = (line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines() if "/memfd:" in line)
    return ProcessFacts(
        fds=len(targets),
        sockets=sum(target.startswith("socket:") for target in targets),
        pools=len({(fields[3], fields[4]) for fields in maps}),  # device and inode
        threads=len(list((folder / "task").iterdir())),
    )


def shared_memory_files() -> set[str]:
    """Names in /dev/shm: what outlives its process there is leaked."""
    return {entry.name for entry in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def _target(entry: os.DirEntry[str]) -> str:
    try:
        return os.readlink(entry.path)
    except OSError:  # it was closed between the two looks
        return ""
