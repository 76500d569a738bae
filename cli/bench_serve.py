"""`penstock bench serve`: a load test of any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..loadtest.names import TEXTS, TIMED
from .arguments import Commands, add_command
from .bench_options import add_bench_serve_options
from .errors import FAILURE, INTERRUPTED, USAGE, CliError
from .terminal import printable, table

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from ..loadtest.bench import Bench, Choice, Outcome, Task
    from ..loadtest.choices import ArrivalChoice, ArrivalShape, WorkloadChoice
    from ..loadtest.lengths import Lengths
    from ..loadtest.metrics import Targets
    from ..loadtest.rendering import Renderer
    from ..loadtest.runner import Recorded
    from ..loadtest.sending import Endpoint, RequestForm

DETAILS = """\
Sends requests at times that are fixed beforehand (unless --concurrency is given), so a slow server is not spared, and
reports TTFT, TPOT, ITL, E2EL, goodput and what the server says of itself. A run whose client was late is marked invalid
and ends with exit code 1. Any OpenAI-compatible server will do. docs/LOADTEST.md says what each figure means."""

EXAMPLE = "penstock bench serve --request-rate 4 --num-requests 500 --goodput ttft:500 tpot:50 --html report.html"


def register(parts: Commands) -> None:
    purpose = "Load a server, this or another, and report latency, throughput and goodput."
    add_bench_serve_options(add_command(parts, "serve", run, purpose, DETAILS, EXAMPLE))


def run(args: argparse.Namespace) -> int:
    import asyncio

    from ..core.clock import MonotonicClock
    from ..loadtest.bench import Bench, perform
    from ..loadtest.client import Client

    choice, task = choice_of(args), task_of(args)
    key = args.api_key or os.environ.get("PENSTOCK_API_KEY")
    clock = MonotonicClock()
    progress = None if args.quiet else Progress(sys.stderr, sys.stderr.isatty())
    outputs = [Path(name) for name in (args.json, args.csv, args.html) if name]
    for path in outputs:
        if not path.parent.is_dir():
            raise CliError(f"{path}: there is no folder {path.parent}", "make it, or name another file", USAGE)
    bench = Bench(clock, watch=None if progress is None else progress.hear)
    with asyncio.Runner() as runner, interrupting(runner.get_loop(), bench):
        outcome = runner.run(perform(task, choice, bench, lambda url: Client(url, clock, key, args.timeout)))
    if progress is not None:
        progress.end()
    return tell(outcome, args)


@contextmanager
def interrupting(loop: AbstractEventLoop, bench: Bench) -> Iterator[None]:
    """The first Ctrl-C ends the run with what it has, the second ends the program."""

    def on_interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        print("\nending with what there is; Ctrl-C again gives up", file=sys.stderr, flush=True)
        bench.interrupt()

    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        if not loop.is_closed():
            loop.remove_signal_handler(signal.SIGINT)


def tell(outcome: Outcome, args: argparse.Namespace) -> int:
    """Write the files, print the tables; the exit code."""
    from ..loadtest.documents import as_csv, as_json
    from ..loadtest.report import as_html
    from ..loadtest.tables import tables, warnings

    date = time.strftime("%Y%m%d-%H%M%S")
    if args.json:
        Path(args.json).write_bytes(as_json(outcome, date))
    if args.csv:
        Path(args.csv).write_text(as_csv(outcome), encoding="utf-8")
    if args.html:
        Path(args.html).write_text(as_html(outcome, date), encoding="utf-8")
    for one in tables(outcome):
        title = f"\n{one.title}" if one.title else ""
        numbers = frozenset(range(1, len(one.rows[0]))) if one.title else frozenset()
        rows = [[printable(cell) for cell in row] for row in one.rows]
        print("\n".join(part for part in (title, table(rows, numbers), *one.notes) if part))
    for text in warnings(outcome):
        print(f"penstock: warning: {printable(text)}", file=sys.stderr)
    if outcome.is_interrupted:
        return INTERRUPTED
    completed = sum(run.summary.throughput.completed for run in outcome.runs)
    return 0 if completed and outcome.is_valid else FAILURE


class Progress:
    """One line on stderr that is written again each second; on a terminal over itself, else every ten seconds."""

    def __init__(self, out: TextIO, is_terminal: bool) -> None:
        self._out, self._is_terminal = out, is_terminal
        self._every_s = 1.0 if is_terminal else 10.0
        self._label, self._next_s = "", 0.0

    def hear(self, label: str, recorded: Recorded, now_s: float) -> None:
        is_over = len(recorded.records) >= recorded.num_planned
        if label == self._label and now_s < self._next_s and not is_over:
            return
        self._label, self._next_s = label, now_s + self._every_s
        failed = sum(record.failure is not None for record in recorded.records)
        tokens = sum(record.output_tokens for record in recorded.records)
        line = (
            f"{printable(label)}: {now_s:.0f} s, {len(recorded.records)}/{recorded.num_planned} ended, "
            f"{failed} failed, {tokens / max(now_s, 1e-9):.0f} tok/s"
        )
        start, end = ("\r\x1b[K", "\n" if is_over else "") if self._is_terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=self._out, flush=True)

    def end(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=self._out, flush=True)


def task_of(args: argparse.Namespace) -> Task:
    from ..loadtest.bench import ProbeSize, Task
    from ..loadtest.search import Limits
    from .http_client import Server

    urls = tuple(Server(url, None).url for url in (args.url, *args.against))
    if args.search and not args.goodput:
        raise CliError("--search: say what a good request keeps", "for example --goodput ttft:500 tpot:50", USAGE)
    if args.search and arrivals_of(args).shape not in ("poisson", "gamma", "constant", "trace"):
        raise CliError("--search: needs arrivals at a rate: poisson, gamma, constant or trace", "", USAGE)
    try:
        shares = tuple(float(part) for part in args.attainment.split(",")) if args.search else ()
    except ValueError as err:
        raise CliError(f"--attainment: {args.attainment!r} is not a list such as 0.9,0.99", "", USAGE) from err
    if any(not 0 < share <= 1 for share in shares):
        raise CliError(f"--attainment: shares lie between 0 and 1, got {args.attainment}", "", USAGE)
    start = _rate(args) or 1.0
    limits = Limits(start, highest=args.max_rate, precision=args.precision, max_probes=args.max_probes)
    return Task(urls, shares, limits, ProbeSize(args.probe_s, args.probe_requests), args.rounds)


def choice_of(args: argparse.Namespace) -> Choice:
    from ..loadtest.bench import Choice

    workload, arrivals, form = workload_of(args), arrivals_of(args), form_of(args)
    return Choice(
        workload,
        arrivals,
        form,
        targets_of(args.goodput),
        renderer_of(args),
        args.seed,
        args.warmup,
        args.max_model_len,
        None if args.max_lag_ms is None else args.max_lag_ms / 1e3,
        args.reset_cache,
    )


def workload_of(args: argparse.Namespace) -> WorkloadChoice:
    from ..loadtest.choices import Sizes, WorkloadChoice

    if args.file is not None and args.workload in ("random", "prefix", "chat"):
        raise CliError(f"--file: the workload {args.workload} reads no file", "name its format with --workload", USAGE)
    sizes = Sizes(
        _lengths("--input-tokens", args.input_tokens),
        _lengths("--output-tokens", args.output_tokens),
        args.prefixes,
        args.prefix_tokens,
        _lengths("--turns", args.turns),
        args.think_s,
        not args.start_fresh,
    )
    return WorkloadChoice(
        args.workload,
        None if args.file is None else Path(args.file),
        args.num_requests,
        sizes,
        args.length_scale,
        not args.keep_batched_times,
        not args.leave_out,
        args.shuffle,
        not args.first_turn_only,
        {"auto": None, "on": True, "off": False}[args.ignore_eos],
    )


def arrivals_of(args: argparse.Namespace) -> ArrivalChoice:
    from ..loadtest.choices import ArrivalChoice

    rate = _rate(args)
    if args.concurrency is not None and (rate is not None or args.arrivals not in (None, "closed")):
        raise CliError(
            "--concurrency: a closed loop has no rate; with both, a slow server would be sent less",
            "leave --request-rate and --arrivals out, or --concurrency",
            USAGE,
        )
    shape: ArrivalShape = args.arrivals or _usual_shape(args, rate)
    if shape == "closed" and args.concurrency is None:
        raise CliError("--arrivals closed: say how many requests are under way", "--concurrency 8", USAGE)
    if shape.endswith("-ramp") and args.end_rate is None:
        raise CliError(f"--arrivals {shape}: say where it ends", "--request-rate 1 --end-rate 10", USAGE)
    if shape == "trace" and args.workload not in TIMED:
        raise CliError(f"--arrivals trace: the workload {args.workload} has no times", "give --request-rate", USAGE)
    if shape not in ("burst", "trace", "closed") and rate == math.inf:
        raise CliError(f"--request-rate: inf is not a rate for {shape} arrivals", "--arrivals burst", USAGE)
    return ArrivalChoice(
        shape,
        1.0 if rate in (None, math.inf) else float(rate or 1.0),
        1.0 if args.burstiness is None else args.burstiness,
        args.end_rate or 0.0,
        args.concurrency or 0,
        args.trace_speed,
        args.duration,
    )


def _usual_shape(args: argparse.Namespace, rate: float | None) -> ArrivalShape:
    if args.concurrency is not None:
        return "closed"
    if rate == math.inf:
        return "burst"
    if args.end_rate is not None:
        return "linear-ramp"
    if rate is None and args.workload in TIMED:
        return "trace"
    return "poisson" if args.burstiness is None else "gamma"


def form_of(args: argparse.Namespace) -> RequestForm:
    from ..loadtest.sending import RequestForm

    is_text = args.workload in TEXTS
    is_chat = is_text or args.workload == "chat" or args.prompts == "text"
    endpoint: Endpoint = args.endpoint or ("chat" if is_chat else "completions")
    if args.prompts == "ids" and (is_text or endpoint == "chat"):
        raise CliError("--prompts ids: only random prompts to completions go as ids", "leave --prompts out", USAGE)
    is_ids = endpoint == "completions" and not is_text and args.prompts != "text"
    extra = None
    if args.extra_body is not None:
        try:
            extra = json.loads(args.extra_body)
        except ValueError as err:
            raise CliError(f"--extra-body: not JSON: {err}", """for example '{"top_p": 0.9}'""", USAGE) from err
        if not isinstance(extra, dict):
            raise CliError("--extra-body: must be a JSON object", """for example '{"top_p": 0.9}'""", USAGE)
    return RequestForm(args.model or "", endpoint, is_ids, temperature=args.temperature, extra=extra)


def renderer_of(args: argparse.Namespace) -> Renderer:
    from ..loadtest.rendering import Renderer

    ids = _lengths("--token-ids", args.token_ids)
    if ids.high <= ids.low:
        raise CliError(f"--token-ids: must be a range such as 1000-30000, got {args.token_ids!r}", "", USAGE)
    return Renderer(args.salt, ids.low, ids.high, is_salting_text=not args.keep_texts)


@dataclass(slots=True)
class _Targets:
    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


def targets_of(texts: list[str]) -> Targets:
    """`ttft:500` in milliseconds, as vLLM's option has it."""
    from ..loadtest.metrics import Targets

    found = _Targets()
    for text in texts:
        match = re.fullmatch(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)", text)
        if match is None or float(match[2]) <= 0:
            raise CliError(f"--goodput: {text!r} is no target", "for example ttft:500 tpot:50 e2el:10000, in ms", USAGE)
        setattr(found, match[1], float(match[2]) / 1e3)
    return Targets(found.ttft, found.tpot, found.e2el)


def _rate(args: argparse.Namespace) -> float | None:
    if args.request_rate is None:
        return None
    try:
        rate = float(args.request_rate)
    except ValueError:
        rate = math.nan
    if not rate > 0 or (rate != math.inf and rate > 1e6):
        raise CliError(f"--request-rate: must be above 0, or inf, got {args.request_rate!r}", "", USAGE)
    return rate


def _lengths(option: str, text: str) -> Lengths:
    from ..loadtest.lengths import Lengths

    try:
        return Lengths.parse(text)
    except ValueError as err:
        raise CliError(f"{option}: {err}", "", USAGE) from err
