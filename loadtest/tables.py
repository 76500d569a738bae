"""An outcome in words and tables, for a terminal and for the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bench import Outcome, Run
from .explained import Explained, Quantiles
from .metrics import Goodput, Latencies, Summary, Targets, ttft_parts
from .statistics import MIN_FOR_P99, Distribution

FEW = "n < 1000"
Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first row is the header, columns after the first are numbers."""

    title: str
    rows: Rows
    notes: tuple[str, ...] = ()


def tables(outcome: Outcome) -> list[Table]:
    """The whole outcome, what matters most first."""
    if outcome.found:
        return [_found(outcome), *(table for run in _best(outcome) for table in run_tables(run, outcome))]
    if outcome.compared or len(outcome.runs) > 1:
        return [_compared(outcome), _runs(outcome)]
    return [table for run in outcome.runs for table in run_tables(run, outcome)]


def run_tables(run: Run, outcome: Outcome) -> list[Table]:
    found = [_facts(run, outcome.choice.targets), _latencies(run.summary)]
    if run.summary.errors:
        found.insert(0, _errors(run))
    if run.summary.phases:
        found.append(_phases(run.summary))
    if run.explained is not None:
        found += _explained(run.explained)
    return found


def warnings(outcome: Outcome) -> list[str]:
    """What a reader has to know before any figure."""
    found = []
    if outcome.is_interrupted:
        last = outcome.runs[-1]
        found.append(
            f"INTERRUPTED: of the last run's {last.workload.num_requests} requests {last.summary.sent} had ended; "
            f"{last.num_cut_off} that were under way are left out of all figures"
        )
    for run in outcome.runs:
        found += [f"{run.label}: {text}" for text in _warnings(run, is_search=bool(outcome.found))]
    found += [
        f"the client could not keep the rate above {one.rate:.3g} requests/s ({one.share:.0%}): the server may do more"
        for one in outcome.found
        if one.is_client_bound
    ]
    return found


def _warnings(run: Run, is_search: bool) -> list[str]:
    summary, workload = run.summary, run.workload
    counts = summary.counts
    texts = []
    if not summary.is_valid:
        texts.append(f"INVALID: {summary.client.why_invalid()}")
    if summary.is_saturated and not is_search:
        texts.append("SATURATED: requests under way and TTFT grow through the run; percentiles depend on its length")
    if workload.num_clipped or workload.num_left_out:
        texts.append(f"{workload.num_clipped} prompts were clipped to the window, {workload.num_left_out} left out")
    if workload.num_repeated:
        texts.append(f"{workload.num_repeated} prompts are repeated: a prefix cache knows them")
    if workload.is_exact_length and counts.num_short_answers:
        texts.append(f"{counts.num_short_answers} answers are shorter than asked: does the server know ignore_eos?")
    if counts.num_counted_by_chunks:
        texts.append(f"{counts.num_counted_by_chunks} answers without usage: each chunk counted as one token")
    return texts


def _best(outcome: Outcome) -> list[Run]:
    """Of each server, the run at the highest rate that met the lowest share."""
    found = []
    for number, target in enumerate(outcome.targets):
        rate = max((one.rate for one in outcome.found if one.server == number), default=0.0)
        found += [run for run in outcome.runs if run.rate == rate and run.target is target][:1]
    return found


def _facts(run: Run, targets: Targets) -> Table:
    summary = run.summary
    rows: Rows = [("", run.target.model)]
    rows += [
        ("workload", run.workload.name),
        ("arrivals", run.arrivals.describe()),
        ("requests sent / completed", f"{summary.sent:,} / {summary.throughput.completed:,}"),
        ("duration", f"{summary.throughput.duration_s:.2f} s"),
        ("offered / completed requests per s", f"{summary.offered_rate:.3f} / {summary.throughput.requests_s:.3f}"),
        ("input / output tokens", f"{summary.throughput.input_tokens:,} / {summary.throughput.output_tokens:,}"),
        ("output tok/s, whole run", f"{summary.throughput.output_tok_s:,.1f}"),
    ]
    if summary.steady_span is not None and summary.steady_throughput is not None:
        where = f"({summary.steady_span.start_s:.1f} to {summary.steady_span.end_s:.1f} s)"
        rows.append(("output tok/s, steady part", f"{summary.steady_throughput.output_tok_s:,.1f} {where}"))
    rows.append(("most requests at once", str(summary.peak_concurrency)))
    if summary.goodput is not None:
        rows += _goodput(summary.goodput, targets)
    return Table("", rows + _server_facts(summary))


def _goodput(goodput: Goodput, targets: Targets) -> Rows:
    low, high = goodput.interval
    return [
        ("targets", targets_text(targets)),
        ("requests that kept them, of those sent", f"{goodput.attainment:.1%} (95 %: {low:.1%} to {high:.1%})"),
        ("goodput, requests per s", f"{goodput.requests_s:.3f}"),
    ]


def targets_text(targets: Targets) -> str:
    """TTFT ≤ 500 ms, TPOT ≤ 50 ms."""
    named = (("TTFT", targets.ttft_s), ("TPOT", targets.tpot_s), ("E2EL", targets.e2e_s))
    return ", ".join(f"{name} ≤ {value * 1e3:g} ms" for name, value in named if value is not None)


def _server_facts(summary: Summary) -> Rows:
    counts, client = summary.counts, summary.client
    rows: Rows = []
    if counts.cached_share is not None:
        rows.append(("prompt tokens from a cache", f"{counts.cached_share:.1%}"))
    if counts.acceptance is not None:
        drafted = counts.accepted_tokens + counts.rejected_tokens
        rows.append(("drafted tokens accepted", f"{counts.acceptance:.1%} of {drafted:,}"))
    rows.append(("tokens per chunk", f"{counts.tokens_per_chunk:.2f}"))
    sends = f"sends {client.lag_p50_s * 1e3:.2f} / {client.lag_p99_s * 1e3:.2f}"
    reads = f"reads {client.loop_lag_p99_s * 1e3:.2f} (p99)"
    rows.append(("client late, ms (p50 / p99)", f"{sends}, {reads}; {client.cpu_share:.0%} of a core"))
    return rows


def _latencies(summary: Summary) -> Table:
    header = ("ms", "mean", "p50", "p90", "p95", "p99", "max", "n")
    rows = [header, *_latency_rows(summary.latencies, "")]
    if summary.steady is not None:
        rows += _latency_rows(summary.steady, ", steady")
    return Table("latency of completed requests", rows)


def _latency_rows(latencies: Latencies, suffix: str) -> Rows:
    named = (
        ("TTFT", latencies.ttft),
        ("TTFT from real send", latencies.service_ttft),
        ("TPOT", latencies.tpot),
        ("ITL between chunks", latencies.itl),
        ("E2EL", latencies.e2e),
    )
    return [
        (name + suffix, *distribution_cells(one)) for name, one in named if not suffix or name != "TTFT from real send"
    ]


def distribution_cells(one: Distribution) -> tuple[str, ...]:
    """mean, p50, p90, p95, p99, max, n, in ms; p99 only of enough values."""
    p99 = f"{one.percentiles[99] * 1e3:.2f}" if one.num >= MIN_FOR_P99 else FEW
    parts = (one.mean, one.percentiles[50], one.percentiles[90], one.percentiles[95])
    return (*(f"{value * 1e3:.2f}" for value in parts), p99, f"{one.greatest * 1e3:.2f}", str(one.num))


def _errors(run: Run) -> Table:
    rows: Rows = [("error", "requests", "example")]
    for kind, count in run.summary.errors.items():
        failures = [record.failure for record in run.records if record.failure is not None]
        example = next(failure.detail for failure in failures if failure.kind.value == kind)
        rows.append((kind, str(count), example[:80]))
    return Table("requests without a whole answer", rows)


def _phases(summary: Summary) -> Table:
    parts = ttft_parts(summary.phases)
    total = sum(summary.phases[name].mean for name in parts)
    rows: Rows = [("ms", "mean", "p50", "p90", "p95", "p99", "max", "share of TTFT")]
    for name, one in summary.phases.items():
        share = f"{one.mean / total:.1%}" if total > 0 and name in parts else "-"
        rows.append((name, *distribution_cells(one)[:-1], share))
    return Table("phases of the server's TTFT, and what lies between it and the client", rows)


def _explained(said: Explained) -> list[Table]:
    """The server's own account: where the time went, what held requests and streams up, what would change it."""
    found = []
    for name, latency, bottleneck in (
        ("time to the first token", said.ttft, said.bottleneck),
        ("time between two tokens", said.itl, said.stream_bottleneck),
    ):
        if not latency.count:
            continue
        rows: Rows = [("ms", "p50", "p90", "p99", "mean", "share at p90")]
        rows += [(part.name, *_quantiles(part.ms), f"{part.share.p90:.0%}") for part in latency.parts if part.ms.p99]
        rows.append((f"all ({latency.count})", *_quantiles(latency.ms), "100%"))
        notes = (
            f"bottleneck: {bottleneck.name}. {bottleneck.sentence}",
            *(f"- {line}" for line in bottleneck.evidence),
        )
        found.append(Table(f"the server on its {name}", rows, notes))
    if said.what_if.changes:
        rows = [("what if", "TTFT p90", "TPOT")]
        rows += [
            (one.change, f"{one.ttft_p90:+.0%}", "-" if one.tpot is None else f"{one.tpot:+.0%}")
            for one in said.what_if.changes
        ]
        found.append(Table("the server on other clusters under this load", rows))
    return found


def _quantiles(of: Quantiles) -> tuple[str, ...]:
    return tuple(f"{value:.1f}" for value in (of.p50, of.p90, of.p99, of.mean))


def _found(outcome: Outcome) -> Table:
    title = f"highest rate with {targets_text(outcome.choice.targets)}"
    has_many = len(outcome.targets) > 1
    rows: Rows = [("requests that keep them", *(["server"] if has_many else []), "requests per s")]
    rows += [
        (
            f"≥ {one.share:.0%}",
            *([outcome.targets[one.server].url] if has_many else []),
            f"{one.rate:.3f}" if one.rate else "none found",
        )
        for one in outcome.found
    ]
    notes = tuple(
        f"{run.label}: {run.summary.goodput.attainment:.1%} of {run.summary.sent}{_marks(run)}"
        for run in outcome.runs
        if run.summary.goodput is not None
    )
    return Table(title, rows, notes)


def _marks(run: Run) -> str:
    return (", saturated" if run.summary.is_saturated else "") + ("" if run.summary.is_valid else ", INVALID")


def _compared(outcome: Outcome) -> Table:
    rows: Rows = [("figure", "server", "ratio to the first", "range", "noise (A/A)", "verdict")]
    rows += [
        (
            one.figure,
            outcome.targets[one.server].url,
            f"{one.ratio.median:.3f}",
            f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
            f"{one.noise.low:.3f} to {one.noise.high:.3f}",
            one.verdict,
        )
        for one in outcome.compared
    ]
    return Table(f"against {outcome.targets[0].url}, median of rounds", rows)


def _runs(outcome: Outcome) -> Table:
    rows: Rows = [("run", "TTFT p50, ms", "TTFT p90, ms", "TPOT p50, ms", "output tok/s", "attainment", "failed")]
    for run in outcome.runs:
        summary = run.summary
        kept = f"{summary.goodput.attainment:.1%}" if summary.goodput else "-"
        rows.append(
            (run.label + _marks(run), *_run_cells(summary), kept, str(summary.sent - summary.throughput.completed))
        )
    return Table("all runs", rows)


def _run_cells(summary: Summary) -> Sequence[str]:
    latencies = summary.latencies
    return (
        f"{latencies.ttft.median * 1e3:.2f}",
        f"{latencies.ttft.percentiles[90] * 1e3:.2f}",
        f"{latencies.tpot.median * 1e3:.2f}",
        f"{summary.throughput.output_tok_s:.1f}",
    )
