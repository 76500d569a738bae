"""The window, put together: latencies by part, workers, the pipe, the bottleneck, what if. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ...core.quantiles import quantile
from .bottleneck import name_bottleneck, name_stream_bottleneck
from .parts import ITL_PARTS, TTFT_PARTS, Microseconds
from .quantiles import shares_around
from .report import QUANTILES, Explanation, Latency, PartRow, Pipe, Quantiles, RequestReport
from .usage import worker_uses
from .what_if import ttft_s, what_if
from .window import RequestFacts, Window


def explain(window: Window, now: float, span_s: float) -> Explanation:
    """What the last `span_s` seconds before `now` say."""
    requests, samples = window.requests(now - span_s), window.samples(now - span_s)
    ttft = latency(TTFT_PARTS, [facts.ttft_us for facts in with_tokens(requests)])
    itl = latency(ITL_PARTS, [gap.parts_us for gap in window.gaps(now - span_s)])
    workers, pipe = worker_uses(samples), pipe_of(requests)
    max_queued = max((sample.queued_requests for sample in samples), default=0)
    return Explanation(
        window_s=span_s,
        requests=len(requests),
        requests_per_s=len(requests) / span_s,
        failed=sum(bool(facts.error) for facts in requests),
        queued=fmean(sample.queued_requests for sample in samples) if samples else 0.0,
        max_queued=max_queued,
        ttft=ttft,
        itl=itl,
        workers=workers,
        pipe=pipe,
        bottleneck=name_bottleneck(ttft, workers, pipe, max_queued),
        stream_bottleneck=name_stream_bottleneck(itl, workers),
        what_if=what_if(with_tokens(window.requests(float("-inf"))), now - span_s, samples, workers),
    )


def with_tokens(requests: Sequence[RequestFacts]) -> list[RequestFacts]:
    """Those that have had a first token."""
    return [facts for facts in requests if any(facts.ttft_us)]


def latency(names: tuple[str, ...], measured: Sequence[Microseconds]) -> Latency:
    """Quantiles of the sums, and each divided among its parts."""
    sums = [sum(parts) for parts in measured]
    if not sums:
        return Latency(0, Quantiles(), [PartRow(name, Quantiles(), Quantiles()) for name in names])
    totals = [quantile(sums, q) / 1e3 for q in QUANTILES.values()] + [fmean(sums) / 1e3]
    columns = [shares_around(measured, q) for q in QUANTILES.values()]
    whole = sum(sums)
    columns.append(tuple(sum(column) / whole if whole else 0.0 for column in zip(*measured, strict=True)))
    rows = []
    for number, name in enumerate(names):
        shares = [column[number] for column in columns]
        ms = [share * total for share, total in zip(shares, totals, strict=True)]
        rows.append(PartRow(name, Quantiles(*ms), Quantiles(*shares)))
    return Latency(len(sums), Quantiles(*totals), rows)


def pipe_of(requests: Sequence[RequestFacts]) -> Pipe:
    handed = [facts for facts in requests if facts.prefill is not None]
    took_s = sum(facts.transfer_s for facts in handed)
    num_bytes = sum(facts.transferred_bytes for facts in handed)
    return Pipe(len(handed), num_bytes, num_bytes / took_s if took_s > 0 and num_bytes else None)


def report_request(facts: RequestFacts, now: float) -> RequestReport:
    return RequestReport(
        facts.request_id,
        facts.label,
        now - facts.at_s,
        facts.decode,
        facts.prefill,
        facts.num_prompt_tokens,
        facts.cached_tokens,
        facts.num_tokens,
        facts.attempts,
        facts.resumed,
        facts.transferred_bytes,
        ttft_ms=ttft_s(facts) * 1e3,
        e2e_ms=facts.e2e_s * 1e3,
        ttft=dict(zip(TTFT_PARTS, (part / 1e3 for part in facts.ttft_us), strict=True)),
        itl=dict(zip(ITL_PARTS, (part / 1e3 for part in facts.itl_us), strict=True)),
        error=facts.error,
    )
