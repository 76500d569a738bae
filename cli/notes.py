"""What /status tells beside figures: legs that are left alone, and roles that have changed. One line for each."""

from __future__ import annotations

from typing import Any

from .terminal import printable

MAX_CHANGES = 3  # shown, the last ones


def worker_notes(workers: list[dict[str, Any]]) -> list[str]:
    """What keeps requests from a worker that looks ready."""
    lines = []
    for worker in workers:
        name = worker.get("worker_id", "")
        for leg, seconds in sorted((worker.get("breakers") or {}).items()):
            lines.append(f"{name}: {leg} is left alone since attempts fail there, next one in {seconds:.1f} s")
        if worker.get("canary"):
            lines.append(f"{name}: {worker['canary']}")
    return [printable(line) for line in lines]


def role_notes(changes: list[dict[str, Any]]) -> list[str]:
    """The last changes of roles, newest first."""
    return [
        printable(
            f"{change.get('worker_id', '')}: {change.get('before', '')} → {change.get('after', '')} "
            f"{float(change.get('age_s', 0.0)):.0f} s ago by the {change.get('by', '')}: {change.get('reason', '')}"
        )
        for change in reversed(changes[-MAX_CHANGES:])
    ]
