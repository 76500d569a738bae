"""One frame of `penstock top`, from two answers of /status. Pure. What an older worker does not tell is a dash."""

from __future__ import annotations

from typing import Any

from .notes import role_notes, worker_notes
from .terminal import byte_size, printable, table

HEADER = ("WORKER", "STATE", "BUSY", "RUN", "WAIT", "KV", "PREFILL/S", "DECODE/S", "HAND-OFFS", "DRAFTS", "RESTARTS")
_RATES = {
    "prefill_tokens_per_s": "prefill_tokens",
    "decode_tokens_per_s": "decode_tokens",
    "transferred_bytes_per_s": "transferred_bytes",
    "transferred_blocks_per_s": "transferred_blocks",
}


def build_frame(before: dict[str, Any], after: dict[str, Any], span_s: float) -> dict[str, Any]:
    """Plain data: the cluster, and one entry for each worker of `after`."""
    earlier = {(row.get("worker_id"), row.get("epoch")): row for row in before["workers"]}
    workers = [_worker(row, earlier.get((row.get("worker_id"), row.get("epoch"))), span_s) for row in after["workers"]]
    moved = [worker["transferred_bytes_per_s"] for worker in workers if worker["role"] != "prefill"]
    return {
        "ready": bool(after.get("ready", True)),
        "why_not_ready": str(after.get("why_not_ready", "")),
        "policy": str(after.get("policy", "")),
        "active_requests": int(after.get("active_requests", 0)),
        "queued_requests": int(after.get("queued_requests", 0)),
        "span_s": span_s,
        "pipe": {
            "handing_off": sum(worker["handing_off"] for worker in workers),
            "receiving": sum(worker["receiving"] for worker in workers),
            "bytes_per_s": sum(rate for rate in moved if rate is not None),
        },
        "balances_roles": bool(after.get("balances_roles", False)),
        "role_changes": list(after.get("role_changes") or []),
        "workers": workers,
    }


def _worker(row: dict[str, Any], before: dict[str, Any] | None, span_s: float) -> dict[str, Any]:
    load = row.get("load") or {}
    total, free = int(row.get("total_blocks", 0)), int(row.get("free_blocks", 0))
    rates = {name: _rate(load, before, field, span_s) for name, field in _RATES.items()}
    return {
        "worker_id": str(row.get("worker_id", "")),
        "role": str(row.get("role", "")),
        "state": str(row.get("state", "")),
        "running": int(row.get("running", 0)),
        "waiting": int(row.get("waiting", 0)),
        "total_blocks": total,
        "used_blocks": total - free,
        "cached_blocks": int(load.get("cached_blocks", 0)),
        "handing_off": int(load.get("handing_off", 0)),
        "receiving": int(load.get("receiving", 0)),
        "failed_handoffs": int(load.get("failed_handoffs", 0)),
        "preemptions": int(load.get("preemptions", 0)),
        "drafted_tokens": int(load.get("drafted_tokens", 0)),
        "accepted_tokens": int(load.get("accepted_tokens", 0)),
        "restarts": int(row.get("restarts", 0)),
        "breakers": dict(row.get("breakers") or {}),
        "canary": str(row.get("canary", "")),
        "turn_age_s": float(row.get("turn_age_s", 0.0)),
        "utilisation": _utilisation(load, before, span_s),
        **rates,
    }


def _rate(load: dict[str, Any], before: dict[str, Any] | None, field: str, span_s: float) -> float | None:
    """Growth of a sum a second; None without an earlier look at the same incarnation."""
    if before is None or field not in load or span_s <= 0:
        return None
    return float(max(0.0, load[field] - (before.get("load") or {}).get(field, 0))) / span_s


def _utilisation(load: dict[str, Any], before: dict[str, Any] | None, span_s: float) -> float | None:
    share = _rate(load, before, "busy_s", span_s)
    return None if share is None else min(1.0, share)


def format_frame(frame: dict[str, Any]) -> str:
    """The pools one under the other, the pipe between them, the router above."""
    ready = "ready" if frame["ready"] else f"not ready: {printable(frame['why_not_ready'])}"
    lines = [f"router: {ready}; {frame['active_requests']} active, {frame['queued_requests']} queued"]
    pools = [(role, [w for w in frame["workers"] if w["role"] == role]) for role in ("prefill", "decode", "both")]
    shown = [(role, workers) for role, workers in pools if workers]
    if not shown:
        return "\n".join([*lines, "no workers"])
    rows = table([HEADER, *(_row(w) for _, workers in shown for w in workers)], right=frozenset(range(2, 11))).split(
        "\n"
    )
    lines += ["", rows.pop(0)]
    for number, (role, workers) in enumerate(shown):
        if number and role == "decode":
            lines.append(_pipe(frame["pipe"]))
        lines.append(f"{role}:")
        lines += [f"{row}" for row in rows[: len(workers)]]
        rows = rows[len(workers) :]
    notes = [*worker_notes(frame["workers"]), *role_notes(frame["role_changes"])]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _pipe(pipe: dict[str, Any]) -> str:
    rate = byte_size(pipe["bytes_per_s"])
    return f"  ║ hand-offs: {pipe['handing_off']} leaving, {pipe['receiving']} arriving, {rate}/s"


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    kv = f"{worker['used_blocks']}/{worker['total_blocks']}"
    drafted = worker["drafted_tokens"]
    return (
        printable(worker["worker_id"]),
        printable(_state(worker)),
        _or_dash(worker["utilisation"], "{:.0%}"),
        str(worker["running"]),
        str(worker["waiting"]),
        kv,
        _or_dash(worker["prefill_tokens_per_s"], "{:.0f}"),
        _or_dash(worker["decode_tokens_per_s"], "{:.0f}"),
        str(worker["handing_off"] + worker["receiving"]),
        f"{worker['accepted_tokens'] / drafted:.0%}" if drafted else "-",
        str(worker["restarts"]),
    )


def _state(worker: dict[str, Any]) -> str:
    if worker["state"] == "stalled":
        return f"stalled {worker['turn_age_s']:.0f} s"
    return str(worker["state"])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
