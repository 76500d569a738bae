"""The answers of GET /explain as text. Pure."""

from __future__ import annotations

from typing import Any

from .terminal import printable, table

PLAIN = {
    "gateway": "gateway: read, template, tokenize",
    "queue": "queue in the router",
    "retry": "attempts that failed",
    "route": "route: choice, messages, inbox",
    "prefill_queue": "prefill queue",
    "prefill_wait": "between chunks",
    "prefill_compute": "prefill compute",
    "first_step": "first step (last chunk, first token)",
    "transfer": "transfer",
    "decode_wait": "decode wait (for room)",
    "delivery": "delivery to the gateway",
    "write": "first write",
    "other": "other",
    "wait": "waiting between steps",
    "prompts": "prompts in the same step",
    "step": "decode step",
}
QUANTILES = ("p50", "p90", "p99", "mean")
HIDDEN_MS = 0.0005  # a part that rounds to nothing everywhere is left out


def format_explanation(document: dict[str, Any]) -> str:
    """All that a person needs; the rest is in --json."""
    head = (
        f"last {document['window_s']:g} s: {document['requests']} requests ended"
        f" ({document['requests_per_s']:.2f} a second), {document['failed']} failed"
    )
    blocks = [
        head,
        _latency("Time to the first token, ms", document["ttft"]),
        _bottleneck("Bottleneck", document["bottleneck"]),
        _latency("Between two tokens, ms", document["itl"]),
        _bottleneck("Streams", document["stream_bottleneck"]),
        _workers(document["workers"]),
        _what_if(document["what_if"]),
    ]
    return "\n\n".join(block for block in blocks if block)


def format_requests(document: dict[str, Any]) -> str:
    return "\n\n".join(_request(request) for request in document["requests"])


def _latency(title: str, latency: dict[str, Any]) -> str:
    if not latency["count"]:
        return ""
    rows: list[tuple[str, ...]] = [(title, *QUANTILES, "share at p90")]
    for part in latency["parts"]:
        if max(part["ms"].values()) >= HIDDEN_MS:
            share = f"{part['share']['p90']:.0%}"
            rows.append((f"  {PLAIN.get(part['name'], printable(part['name']))}", *_cells(part["ms"]), share))
    rows.append((f"all ({latency['count']})", *_cells(latency["ms"]), "100%"))
    return table(rows, right=frozenset({1, 2, 3, 4, 5}))


def _cells(ms: dict[str, float]) -> list[str]:
    return [f"{ms[name]:.1f}" for name in QUANTILES]


def _bottleneck(title: str, bottleneck: dict[str, Any]) -> str:
    lines = [f"{title}: {printable(bottleneck['name'])}. {printable(bottleneck['sentence'])}"]
    return "\n".join([*lines, *(f"  - {printable(line)}" for line in bottleneck["evidence"])])


def _workers(workers: list[dict[str, Any]]) -> str:
    if not workers:
        return "no workers"
    header = ("WORKER", "ROLE", "STATE", "BUSY", "RUNNING", "WAITING", "KV USED", "PREFILL TOK/S", "DECODE TOK/S")
    rows: list[tuple[str, ...]] = [header]
    for worker in workers:
        cells = (printable(str(worker[name])) for name in ("worker_id", "role", "state"))
        rows.append(
            (
                *cells,
                _or_dash(worker["utilisation"], "{:.0%}"),
                f"{worker['running']:.1f}",
                f"{worker['waiting']:.1f}",
                f"{worker['kv_used']:.0%}",
                _or_dash(worker["prefill_tokens_per_s"], "{:.0f}"),
                _or_dash(worker["decode_tokens_per_s"], "{:.0f}"),
            )
        )
    return table(rows, right=frozenset({3, 4, 5, 6, 7, 8}))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _what_if(what_if: dict[str, Any]) -> str:
    if what_if["why_not"]:
        return f"What if: no figures. {printable(what_if['why_not'][:1].upper() + what_if['why_not'][1:])}."
    rows: list[tuple[str, ...]] = [("What if", "TTFT p50", "p90", "p99", "TPOT")]
    for change in what_if["changes"]:
        ttfts = (_change(change[f"ttft_{name}"]) for name in ("p50", "p90", "p99"))
        tpot = "-" if change["tpot"] is None else _change(change["tpot"])
        rows.append((f"  {printable(change['change'])}", *ttfts, tpot))
    note = f"  (the replay of the window as it was is {what_if['error']:+.0%} off at p90)"
    return "\n".join([table(rows, right=frozenset({1, 2, 3, 4})), note])


def _change(share: float) -> str:
    text = f"{share:+.0%}".replace("-", "−")
    return "±0%" if text in ("+0%", "−0%") else text


def _request(request: dict[str, Any]) -> str:
    where = f"{request['prefill']} → {request['decode']}" if request["prefill"] else request["decode"] or "nowhere"
    facts = (
        f"{request['prompt_tokens']} prompt tokens ({request['cached_tokens']} cached), {request['tokens']} tokens, "
        f"attempts {request['attempts']}, resumed {request['resumed']}, {request['transferred_bytes']} bytes moved"
    )
    error = f"\nended with {printable(request['error'])}" if request["error"] else ""
    head = f"{printable(request['request_id'])}, {request['age_s']:.0f} s ago, {printable(where)}\n{facts}{error}"
    return f"{head}\n{_parts('time to the first token, ms', request['ttft'])}" + (
        f"\n{_parts('between its tokens, ms in all', request['itl'])}" if any(request["itl"].values()) else ""
    )


def _parts(title: str, parts: dict[str, float]) -> str:
    rows = [(f"  {PLAIN.get(name, printable(name))}", f"{ms:.3f}") for name, ms in parts.items() if ms >= HIDDEN_MS]
    return table([(title, ""), *rows, ("sum", f"{sum(parts.values()):.3f}")], right=frozenset({1}))
