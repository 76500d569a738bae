"""One HTML file with everything: figures, plots, definitions. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .bench import Found, Outcome, Run
from .metrics import tokens_by_second, ttft_parts
from .plots import Axes, Line, bars, cumulative, plot, thinned
from .steady import concurrency
from .tables import Table, run_tables, tables, warnings

MAX_DETAILED_RUNS = 12

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 24px auto; padding: 0 16px; color: #222; }
table { border-collapse: collapse; margin: 8px 0 18px; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td + td, th + th { font-variant-numeric: tabular-nums; } caption { text-align: left; font-weight: 600; padding: 4px 0; }
figure { display: inline-block; width: 520px; max-width: 100%; margin: 6px 8px 6px 0; vertical-align: top; }
figcaption { font-weight: 600; } svg { width: 100%; font: 12px system-ui, sans-serif; }
.warning { background: #fff3e0; border-left: 4px solid #d1602b; padding: 6px 12px; margin: 6px 0; }
dt { font-weight: 600; }
"""

DEFINITIONS = (
    ("TTFT", "from the time a request was meant to be sent to the first event with text"),
    ("TPOT", "(last token − first token) / (tokens − tokens of the first event); undefined for one token"),
    ("ITL", "time between two events that brought tokens, however many tokens they brought"),
    ("E2EL", "from the time a request was meant to be sent to its last byte"),
    ("attainment", "requests that kept every target, of all that were sent: failed and refused ones kept none"),
    ("goodput", "requests that kept every target, per second of the run"),
    ("steady", "from the first to the last moment with 0.8 of the peak of requests under way"),
    ("INVALID", "the client was late by more than its bound: the figures say more about it than about the server"),
)


def as_html(outcome: Outcome, date: str) -> str:
    """The report. All text from servers and files is escaped."""
    names = ", ".join(f"{target.model} at {target.url}" for target in outcome.targets)
    parts = [f"<h1>Load test</h1><p>{escape(names)}; {escape(date)}; seed {outcome.choice.seed}</p>"]
    parts += [f'<p class="warning">{escape(text)}</p>' for text in warnings(outcome)]
    parts += [_table(table) for table in tables(outcome)]
    if len(outcome.runs) > 1:
        parts.append(_across(outcome))
    for run in outcome.runs[-MAX_DETAILED_RUNS:]:
        parts.append(_run(run, outcome))
    parts.append("<h2>What the figures mean</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS]
    body = "".join(parts) + "</dl>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _table(table: Table) -> str:
    head, *rows = table.rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    notes = "".join(f"<br>{escape(note)}" for note in table.notes)
    return f"<table><caption>{escape(table.title)}</caption><tr>{cells}</tr>{lines}</table><p>{notes}</p>"


def _across(outcome: Outcome) -> str:
    """Rate against attainment, one line a server; and latencies of all runs."""
    lines, latency = [], []
    for target in dict.fromkeys(run.target.url for run in outcome.runs):
        runs = [run for run in outcome.runs if run.target.url == target]
        points = sorted(
            (run.summary.offered_rate, 100 * run.summary.goodput.attainment) for run in runs if run.summary.goodput
        )
        lines.append(Line(target, points, has_dots=True))
        medians = sorted((run.summary.offered_rate, 1e3 * run.summary.latencies.ttft.median) for run in runs)
        latency.append(Line(target, medians, has_dots=True))
    marks = tuple((_mark(one, outcome), one.rate) for one in outcome.found if one.rate)
    attainment = plot(
        "Attainment by rate", lines, Axes("requests per s", "% that kept all targets", y_max=102, marks=marks)
    )
    return "<h2>All runs</h2>" + attainment + plot("TTFT by rate", latency, Axes("requests per s", "TTFT p50, ms"))


def _mark(one: Found, outcome: Outcome) -> str:
    server = f" {outcome.targets[one.server].url}" if len(outcome.targets) > 1 else ""
    return f"≥ {one.share:.0%}{server}"


def _run(run: Run, outcome: Outcome) -> str:
    own = "".join(_table(table) for table in run_tables(run, outcome)) if len(outcome.runs) > 1 else ""
    details = f"<details><summary>figures</summary>{own}</details>" if own else ""
    pictures = [*_distributions(run, outcome), *_timelines(run), *_phases(run)]
    return f"<h2>{escape(run.label)}</h2>{details}{''.join(pictures)}"


def _distributions(run: Run, outcome: Outcome) -> Sequence[str]:
    done = [record for record in run.records if record.is_completed]
    targets = outcome.choice.targets
    named: list[tuple[str, list[float], float | None]] = [
        ("TTFT", [r.ttft_s for r in done if r.ttft_s is not None], targets.ttft_s),
        ("TPOT", [r.tpot_s for r in done if r.tpot_s is not None], targets.tpot_s),
        ("ITL between chunks", [gap for record in done for gap in record.gaps_s], None),
        ("E2EL", [record.e2e_s for record in done], targets.e2e_s),
    ]
    found = []
    for name, values, target_s in named:
        marks = () if target_s is None else (("target", target_s * 1e3),)
        line = Line("", cumulative([value * 1e3 for value in values]))
        found.append(plot(f"{name}, distribution", [line], Axes("ms", "share of values", True, 1.0, marks)))
    return found


def _timelines(run: Run) -> Sequence[str]:
    done = [record for record in run.records if record.ttft_s is not None]
    failed = [(record.asked.intended_s, 0.0) for record in run.records if record.failure is not None]
    ttft = thinned([(record.asked.intended_s, (record.ttft_s or 0.0) * 1e3) for record in done])
    by_second = [(second + 0.5, count) for second, count in enumerate(tokens_by_second(run.records))]
    under_way = thinned([(at_s, float(level)) for at_s, level in concurrency(run.records)])
    return [
        plot(
            "TTFT over the run",
            [Line("TTFT", ttft, is_dots=True), Line("failed", failed, is_dots=True)],
            Axes("s since the start, when sent", "TTFT, ms"),
        ),
        plot("Requests under way", [Line("", under_way, is_step=True)], Axes("s since the start", "requests")),
        plot("Output tokens", [Line("", thinned(by_second))], Axes("s since the start", "tokens in that second")),
    ]


def _phases(run: Run) -> Sequence[str]:
    phases = run.summary.phases
    if not phases:
        return []
    parts = ttft_parts(phases)
    rows = [
        ("mean", [(name, phases[name].mean * 1e3) for name in parts]),
        ("p50", [(name, phases[name].median * 1e3) for name in parts]),
        ("p90", [(name, phases[name].percentiles[90] * 1e3) for name in parts]),
    ]
    return [bars("Phases of TTFT (percentiles of each phase by itself)", rows, "ms")]
