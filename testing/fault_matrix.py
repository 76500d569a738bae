"""Every kind of fault at every moment of a request's life: 14 x 12 cells, each proved to have happened.

python -m penstock.testing.fault_matrix                                    all cells on virtual time
python -m penstock.testing.fault_matrix --kind RST --moment mid-stream     some of them; parts of names will do
python -m penstock.testing.fault_matrix --real                             those that need no root, with real processes

A cell is run for each target that makes sense (router, prefill, decode, their links) and, on virtual time, in a
cluster of one pair and of two; it passes when all its runs do. What is allowed: the exact answer, at once (`ok`) or
by another attempt (`resumed`), or one clean error (`error`, or a star) where the request is declared non-resumable:
when the process ends that its stream passes through (adr/002). `failed` is anything else, and a fault that did not
happen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .fault_cell import Run, RunResult, run_once
from .fault_kinds import KINDS, Kind
from .fault_moments import Moment
from .real_faults import why_impossible
from .real_matrix import plan_real, run_side_by_side
from .seeds import quiet

SEVERITY = ("ok", "resumed", "error", "failed")
STAR = (
    "* the exact answer where a worker is struck; a clean error where the front itself is and its streams end with it"
)
MAX_FAILURES = 40
PAIRS = (1, 2)

Cell = tuple[str, str]  # kind, moment


@dataclass(slots=True)
class Matrix:
    """The results by cell. `reasons`: why a cell is not applicable, for those without a run."""

    results: dict[Cell, list[RunResult]] = field(default_factory=dict)
    reasons: dict[Cell, str] = field(default_factory=dict)

    def add(self, result: RunResult) -> None:
        self.results.setdefault((result.run.kind.name, result.run.moment.value), []).append(result)

    def outcome(self, cell: Cell) -> str:
        """The worst of the cell's runs, with a star where one of them ended in the clean error that is declared."""
        outcomes = {result.outcome for result in self.results.get(cell, [])}
        worst = max(outcomes - {"error"}, key=SEVERITY.index, default="error" if outcomes else "n.a.")
        return f"{worst}*" if "error" in outcomes - {worst} else worst

    @property
    def failures(self) -> list[RunResult]:
        return [result for results in self.results.values() for result in results if result.outcome == "failed"]

    @property
    def num_runs(self) -> int:
        return sum(map(len, self.results.values()))


def plan(kinds: Sequence[Kind], moments: Sequence[Moment], pairs: Sequence[int] = PAIRS) -> list[Run]:
    """The runs of these cells, kind by kind."""
    return [Run(k, m, target, n) for k in kinds for m in moments for target in k.targets for n in pairs]


def run_all(runs: Iterable[Run], processes: int = 1, on_result: Callable[[RunResult], None] | None = None) -> Matrix:
    """Play every run on virtual time."""
    matrix = Matrix()

    def take(results: Iterable[RunResult]) -> None:
        for result in results:
            matrix.add(result)
            if on_result is not None:
                on_result(result)

    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            take(pool.map(run_quietly, runs, chunksize=8))
    else:
        take(map(run_quietly, runs))
    return matrix


def run_quietly(run: Run) -> RunResult:
    """The log of a system that is hit on purpose is of no use to anybody."""
    with quiet():
        return run_once(run)


# ---- what people see ----


def render(matrix: Matrix, kinds: Sequence[Kind], moments: Sequence[Moment]) -> str:
    """The table, one row a kind, with a legend for the columns."""
    width = max(len(kind.name) for kind in kinds)
    lines = [f"{number:>3}  {moment.value}" for number, moment in enumerate(moments, 1)]
    lines += ["", " " * width + "".join(f"{number:>9}" for number in range(1, len(moments) + 1))]
    for kind in kinds:
        outcomes = [matrix.outcome((kind.name, moment.value)) for moment in moments]
        lines.append(f"{kind.name:<{width}}" + "".join(f"{outcome:>9}" for outcome in outcomes))
    lines += [STAR] if any("*" in line for line in lines) else []
    lines += [f"n.a.: {kind} at {moment}: {reason}" for (kind, moment), reason in matrix.reasons.items()]
    return "\n".join(lines)


def summarise(matrix: Matrix, seconds: float) -> str:
    cells = Counter(matrix.outcome(cell) for cell in matrix.results)
    slowest = max((r.recovered_s for results in matrix.results.values() for r in results), default=0.0)
    counted = ", ".join(f"{cells[outcome]} {outcome}" for outcome in sorted(cells))
    return (
        f"{len(matrix.results)} cells ({counted}), {matrix.num_runs} runs, {len(matrix.failures)} failed, in "
        f"{seconds:.1f} s; the victim ended at most {slowest:.2f} s after the fault"
    )


def as_json(matrix: Matrix) -> list[dict[str, object]]:
    """One object for each run."""
    return [
        {
            "kind": result.run.kind.name,
            "moment": result.run.moment.value,
            "target": result.run.target.value,
            "pairs": result.run.num_pairs,
            "outcome": result.outcome,
            "why": result.why,
            "attempts": result.attempts,
            "recovered_s": round(result.recovered_s, 4),
        }
        for results in matrix.results.values()
        for result in results
    ]


class _Progress:
    """A line on stderr for every kind that is through, and for every failure."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs, self._num_done, self._kind = num_runs, 0, ""

    def __call__(self, result: RunResult) -> None:
        self._num_done += 1
        if result.run.kind.name != self._kind:
            self._kind = result.run.kind.name
            sys.stderr.write(f"{self._num_done:>4}/{self._num_runs}  {self._kind}\n")
        if result.outcome == "failed":
            sys.stderr.write(f"FAIL  {result.run.name}: {result.why}\n")


def main(argv: list[str] | None = None) -> int:
    """0 when every cell held."""
    args = _parser().parse_args(argv)
    kinds = _named(KINDS, args.kind, lambda kind: kind.name)
    moments = _named(tuple(Moment), args.moment, lambda moment: moment.value)
    if not kinds or not moments:
        names = ", ".join(kind.name for kind in KINDS) if not kinds else ", ".join(m.value for m in Moment)
        sys.stderr.write(f"no {'kind' if not kinds else 'moment'} has that in its name; there are: {names}\n")
        return 2
    start = time.perf_counter()
    matrix = _real(kinds, moments, args.processes) if args.real else _virtual(kinds, moments, args.processes)
    for result in matrix.failures[:MAX_FAILURES]:
        sys.stdout.write(f"FAIL  {result.run.name}: {result.why}\n")
    sys.stdout.write(f"{render(matrix, kinds, moments)}\n\n{summarise(matrix, time.perf_counter() - start)}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(matrix), indent=1) + "\n", encoding="utf-8")
    return int(bool(matrix.failures))


def _virtual(kinds: Sequence[Kind], moments: Sequence[Moment], processes: int) -> Matrix:
    runs = plan(kinds, moments)
    return run_all(runs, processes, _Progress(len(runs)))


def _real(kinds: Sequence[Kind], moments: Sequence[Moment], clusters: int) -> Matrix:
    """The cells that real processes allow, in so many clusters side by side; the others with their reason."""
    matrix, possible = Matrix(), []
    for kind in kinds:
        if why := why_impossible(kind.name):
            matrix.reasons.update({(kind.name, moment.value): why for moment in moments})
            sys.stderr.write(f"SKIPPED  {kind.name}: {why}\n")
        else:
            possible.append(kind)
    runs = plan_real(possible, moments)
    progress = _Progress(len(runs))

    def take(result: RunResult) -> None:
        matrix.add(result)
        progress(result)

    with quiet():
        asyncio.run(run_side_by_side([runs[start::clusters] for start in range(clusters)], take))
    return matrix


T = TypeVar("T")


def _named(items: Sequence[T], text: str | None, name: Callable[[T], str]) -> list[T]:
    """Those called `text`, or else those with it in their name; all without a text."""
    wanted = (text or "").lower()
    exact = [item for item in items if name(item).lower() == wanted]
    return exact or [item for item in items if wanted in name(item).lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m penstock.testing.fault_matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", metavar="K", help="kinds with this in their name")
    parser.add_argument("--moment", metavar="M", help="moments with this in their name")
    parser.add_argument("--real", action="store_true", help="with real processes, on this machine's clock")
    parser.add_argument("--processes", type=int, default=1, help="how many runs, or clusters, side by side (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
