"""Run seeds of the cluster simulation.

python -m penstock.testing.simulate --seeds 0..1000          a range; the rate, and one line to replay for each failure
python -m penstock.testing.simulate --seed 42 --trace        the story of one seed
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from .history import HistoryWriter
from .planted.catalog import BUGS, plant_of
from .scenario import Outcome
from .seeds import Failure, run_seed, run_seeds

PROGRESS_S = 2.0
MAX_SHOWN = 20  # failures; the others are only counted


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


class Tally:
    """Sums over many outcomes, in constant memory, with a line of progress now and then."""

    def __init__(self, num_seeds: int, quiet: bool) -> None:
        self._num_seeds, self._quiet = num_seeds, quiet
        self._start = self._said_at = time.perf_counter()
        self.outcomes = self.requests = self.errors = self.retries = 0
        self.preemptions = self.parked = self.unparked = self.drafted = self.accepted = 0
        self.faults: Counter[str] = Counter()
        self.failures: list[Failure] = []

    def take(self, result: Outcome | Failure) -> None:
        if isinstance(result, Failure):
            self.failures.append(result)
            if len(self.failures) <= MAX_SHOWN:
                sys.stdout.write(f"{result}\n")
        else:
            self.outcomes += 1
            self.requests += result.num_requests
            self.errors += result.num_errors
            self.retries += result.num_retries
            self.preemptions += result.num_preemptions
            self.parked += result.num_parked
            self.unparked += result.num_unparked
            self.drafted += result.num_drafted
            self.accepted += result.num_accepted
            self.faults += result.faults
        now = time.perf_counter()
        if not self._quiet and now - self._said_at >= PROGRESS_S:
            self._said_at = now
            _tell(f"{self.total} of {self._num_seeds} seeds, {len(self.failures)} failed, {self.rate:.0f} seeds/s")

    @property
    def total(self) -> int:
        return self.outcomes + len(self.failures)

    @property
    def rate(self) -> float:
        return self.total / (time.perf_counter() - self._start)

    def summary(self) -> str:
        return (
            f"{self.total} seeds, {len(self.failures)} failed, {self.rate:.1f} seeds/s; {self.requests} requests, "
            f"{self.errors} clean errors, {self.retries} retries, {self.preemptions} preemptions "
            f"({self.parked} parked, {self.unparked} unparked), "
            f"{self.drafted} tokens drafted ({self.accepted} accepted), "
            f"{sum(self.faults.values())} faults of {len(self.faults)} kinds"
        )


def _parse_range(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last) if last else int(first) + 1)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.simulate", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=_parse_range, metavar="A..B", help="a range of seeds, B not included")
    which.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--trace", action="store_true", help="tell what happens, with --seed")
    parser.add_argument("--history", type=Path, metavar="FILE", help="write what the clients saw, with --seed")
    parser.add_argument("--bug", choices=list(BUGS), help="plant a bug that the invariants must catch")
    parser.add_argument("--processes", type=int, default=1, help="how many seeds run side by side (default 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 when every seed held."""
    args = _parse_args(argv)
    plant = plant_of(args.bug)
    if args.seed is not None:
        with open(args.history, "wb") if args.history else nullcontext() as file:
            history = HistoryWriter(file) if file is not None else None
            trace = _tell if args.trace else None
            result = run_seed(args.seed, bug=args.bug, plant=plant, trace=trace, history=history)
        sys.stdout.write(f"{result}\n")
        return int(isinstance(result, Failure))
    tally = Tally(len(args.seeds), args.quiet)
    for result in run_seeds(args.seeds, bug=args.bug, plant=plant, processes=args.processes):
        tally.take(result)
    sys.stdout.write(f"{tally.summary()}\n")
    return int(bool(tally.failures))


if __name__ == "__main__":
    raise SystemExit(main())
