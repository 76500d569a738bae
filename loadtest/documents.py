"""An outcome as JSON and CSV. One run has the keys of vLLM's `bench serve` result at the top, so its readers work; what
is only ours stands under `penstock`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import msgspec

from .bench import Outcome, Run
from .metrics import Latencies, Throughput, prompt_tokens
from .record import Record
from .statistics import MIN_FOR_P99, PERCENTILES, Distribution
from .steady import Span

Json = dict[str, object]


def as_json(outcome: Outcome, date: str) -> bytes:
    """`date` like 20261231-235959. A search and a comparison have all runs under `runs`."""
    if len(outcome.runs) == 1 and not outcome.found:
        return _encode(run_document(outcome.runs[0], outcome, date))
    document: Json = {
        "date": date,
        "searches": [
            {
                "attainment": one.share,
                "request_rate": one.rate,
                "is_client_bound": one.is_client_bound,
                "server": one.server,
            }
            for one in outcome.found
        ],
        "servers": [{"url": target.url, "model_id": target.model} for target in outcome.targets],
        "compared": [msgspec.to_builtins(one) for one in outcome.compared],
        "runs": [run_document(run, outcome, date) for run in outcome.runs],
    }
    return _encode(document)


def run_document(run: Run, outcome: Outcome, date: str) -> Json:
    """vLLM's keys: seconds in lists, milliseconds in `…_ms`."""
    summary, arrivals, form = run.summary, run.arrivals, outcome.choice.form
    records = run.records
    document: Json = {
        "date": date,
        "backend": "openai-chat" if form.endpoint == "chat" else "openai",
        "endpoint_type": "openai-chat" if form.endpoint == "chat" else "openai",
        "label": run.label,
        "model_id": run.target.model,
        "tokenizer_id": run.target.model,
        "num_prompts": summary.sent,
        "request_rate": "inf" if arrivals.shape in ("closed", "burst") else _rate(run),
        "burstiness": arrivals.burstiness if arrivals.shape == "gamma" else 1.0,
        "max_concurrency": arrivals.concurrency or None,
        "duration": summary.throughput.duration_s,
        "completed": summary.throughput.completed,
        "failed": summary.sent - summary.throughput.completed,
        "total_input_tokens": summary.throughput.input_tokens,
        "total_output_tokens": summary.throughput.output_tokens,
        "request_throughput": summary.throughput.requests_s,
        "request_goodput": None if summary.goodput is None else summary.goodput.requests_s,
        "output_throughput": summary.throughput.output_tok_s,
        "total_token_throughput": summary.throughput.total_tok_s,
        "max_output_tokens_per_s": summary.peak_output_tok_s,
        "max_concurrent_requests": summary.peak_concurrency,
    }
    document |= _latency_keys(summary.latencies)
    document |= {
        "input_lens": [prompt_tokens(record) for record in records],
        "output_lens": [record.output_tokens if record.is_completed else 0 for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [record.gaps_s for record in records],
        "start_times": [record.sent_s for record in records],
        "errors": [
            "" if record.failure is None else f"{record.failure.kind}: {record.failure.detail}" for record in records
        ],
    }
    return document | {"penstock": _own(run, outcome)}


def _error(record: Record) -> str:
    return "" if record.failure is None else f"{record.failure.kind}: {record.failure.detail}"


def _rate(run: Run) -> float:
    return run.summary.offered_rate if run.arrivals.shape == "trace" else run.arrivals.rate


def _latency_keys(latencies: Latencies) -> Json:
    found: Json = {}
    for name, one in (
        ("ttft", latencies.ttft),
        ("tpot", latencies.tpot),
        ("itl", latencies.itl),
        ("e2el", latencies.e2e),
    ):
        found |= {
            f"mean_{name}_ms": one.mean * 1e3,
            f"median_{name}_ms": one.median * 1e3,
            f"std_{name}_ms": one.std * 1e3,
        }
        found |= {f"p{p}_{name}_ms": one.percentiles[p] * 1e3 for p in PERCENTILES}
    return found


def _own(run: Run, outcome: Outcome) -> Json:
    summary, targets, workload = run.summary, outcome.choice.targets, run.workload
    return {
        "is_valid": summary.is_valid,
        "why_invalid": summary.client.why_invalid(),
        "is_saturated": summary.is_saturated,
        "explain": None if run.explained is None else msgspec.to_builtins(run.explained),
        "is_interrupted": outcome.is_interrupted and run is outcome.runs[-1],
        "url": run.target.url,
        "seed": outcome.choice.seed,
        "arrivals": run.arrivals.describe(),
        "offered_rate": summary.offered_rate,
        "workload": {
            "name": workload.name,
            "clipped": workload.num_clipped,
            "left_out": workload.num_left_out,
            "repeated": workload.num_repeated,
            "ignore_eos": workload.is_exact_length,
        },
        "targets_ms": {
            name: None if value is None else value * 1e3
            for name, value in (("ttft", targets.ttft_s), ("tpot", targets.tpot_s), ("e2el", targets.e2e_s))
        },
        "good": None if summary.goodput is None else summary.goodput.good,
        "attainment": None if summary.goodput is None else summary.goodput.attainment,
        "attainment_interval": None if summary.goodput is None else summary.goodput.interval,
        "errors_by_kind": summary.errors,
        "service_ttft_ms": _distribution_ms(summary.latencies.service_ttft),
        "client": {
            "send_lag_p50_ms": summary.client.lag_p50_s * 1e3,
            "send_lag_p99_ms": summary.client.lag_p99_s * 1e3,
            "loop_lag_p99_ms": summary.client.loop_lag_p99_s * 1e3,
            "bound_ms": summary.client.bound_s * 1e3,
            "cpu_share": summary.client.cpu_share,
        },
        "steady": _steady(summary.steady_span, summary.steady, summary.steady_throughput),
        "counts": msgspec.to_builtins(summary.counts),
        "phases_ms": {name: _distribution_ms(one) for name, one in summary.phases.items()},
    }


def _steady(span: Span | None, latencies: Latencies | None, throughput: Throughput | None) -> Json | None:
    if span is None or latencies is None or throughput is None:
        return None
    return {
        "start_s": span.start_s,
        "end_s": span.end_s,
        "output_throughput": throughput.output_tok_s,
        "request_throughput": throughput.requests_s,
        **_latency_keys(latencies),
    }


def _distribution_ms(one: Distribution) -> Json:
    found: Json = {"num": one.num, "mean": one.mean * 1e3, "std": one.std * 1e3, "max": one.greatest * 1e3}
    return found | {f"p{p}": value * 1e3 for p, value in one.percentiles.items() if p < 99 or one.num >= MIN_FOR_P99}


COLUMNS = (
    "run",
    "url",
    "number",
    "turn",
    "category",
    "intended_s",
    "sent_s",
    "first_s",
    "last_s",
    "end_s",
    "ttft_ms",
    "tpot_ms",
    "e2el_ms",
    "planned_prompt_tokens",
    "prompt_tokens",
    "cached_tokens",
    "planned_output_tokens",
    "output_tokens",
    "accepted_tokens",
    "rejected_tokens",
    "chunks",
    "finish_reason",
    "is_good",
    "error",
    "status",
    "detail",
)


def as_csv(outcome: Outcome) -> str:
    """A row for each request of each run; empty where a value is not known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = sorted({name for run in outcome.runs for record in run.records for name in record.phases})
    writer.writerow([*COLUMNS, *(f"penstock_{name}" for name in names)])
    for run in outcome.runs:
        for record in run.records:
            writer.writerow([*_row(run, record, outcome), *(record.phases.get(name, "") for name in names)])
    return out.getvalue()


def _row(run: Run, record: Record, outcome: Outcome) -> Sequence[object]:
    asked, use, failure = record.asked, record.use, record.failure
    targets = outcome.choice.targets
    return [
        run.label,
        run.target.url,
        asked.number,
        asked.turn,
        asked.category,
        *(_seconds(value) for value in (asked.intended_s, record.sent_s, record.first_s, record.last_s, record.end_s)),
        *(_millis(value) for value in (record.ttft_s, record.tpot_s, record.e2e_s)),
        asked.prompt_tokens,
        _known(use.prompt_tokens),
        _known(use.cached_tokens),
        asked.output_tokens,
        record.output_tokens,
        _known(use.accepted_tokens),
        _known(use.rejected_tokens),
        len(record.arrivals),
        record.finish_reason or "",
        "" if targets.is_empty else int(targets.is_met(record)),
        "" if failure is None else failure.kind.value,
        "" if failure is None else _known(failure.status),
        "" if failure is None else failure.detail,
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _millis(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.3f}"


def _known(value: int | None) -> object:
    return "" if value is None else value


def _encode(document: Json) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=1)
