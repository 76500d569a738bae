"""Run seeds of the cluster simulation.

python -m penstock.testing.simulate --seeds 0..1000          a range; the rate, and one line to replay for each failure
python -m penstock.testing.simulate --seed 42 --trace        the story of one seed
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

from .planted import BUGS, planted
from .scenario import Outcome, draw_scenario, run_scenario


def replay_command(seed: int, bug: str | None = None) -> str:
    return f"python -m penstock.testing.simulate --seed {seed} --trace" + (f" --bug {bug}" if bug else "")


def run_seed(seed: int, *, bug: str | None = None, trace: bool = False) -> Outcome | str:
    """The outcome of one seed, or what broke, with the line that replays it."""
    logging.disable(logging.CRITICAL)
    try:
        with planted(bug) if bug else nullcontext():
            return run_scenario(draw_scenario(seed), _tell if trace else None)
    except Exception as error:  # a crash of the system under test is a finding like any other
        logging.getLogger(__name__).debug("seed %d", seed, exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
        return f"seed {seed}: {kind}: {error} ({place})\n  {replay_command(seed, bug)}"
    finally:
        logging.disable(logging.NOTSET)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def run_seeds(seeds: Iterable[int], *, bug: str | None = None, processes: int = 1) -> tuple[list[Outcome], list[str]]:
    """(outcomes, failures), in the order of the seeds."""
    seeds = list(seeds)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            results = list(pool.map(_run_one, [(seed, bug) for seed in seeds], chunksize=16))
    else:
        results = [run_seed(seed, bug=bug) for seed in seeds]
    return [r for r in results if isinstance(r, Outcome)], [r for r in results if isinstance(r, str)]


def _run_one(job: tuple[int, str | None]) -> Outcome | str:
    return run_seed(job[0], bug=job[1])


def _parse_range(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last) if last else int(first) + 1)


def main(argv: list[str] | None = None) -> int:
    """0 when every seed held."""
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.simulate", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seeds", type=_parse_range, metavar="A..B", help="a range of seeds, B not included")
    which.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--trace", action="store_true", help="tell what happens, with --seed")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant a bug that the invariants must catch")
    parser.add_argument("--processes", type=int, default=1, help="how many seeds run side by side (default 1)")
    args = parser.parse_args(argv)
    if args.seed is not None:
        result = run_seed(args.seed, bug=args.bug, trace=args.trace)
        sys.stdout.write(f"{result}\n")
        return int(isinstance(result, str))
    start = time.perf_counter()
    outcomes, failures = run_seeds(args.seeds, bug=args.bug, processes=args.processes)
    seconds = time.perf_counter() - start
    for failure in failures:
        sys.stdout.write(f"{failure}\n")
    _summarise(outcomes, failures, seconds)
    return int(bool(failures))


def _summarise(outcomes: list[Outcome], failures: list[str], seconds: float) -> None:
    total = len(outcomes) + len(failures)
    faults: Counter[str] = sum((o.faults for o in outcomes), Counter())
    requests, errors = sum(o.num_requests for o in outcomes), sum(o.num_errors for o in outcomes)
    retries, preemptions = sum(o.num_retries for o in outcomes), sum(o.num_preemptions for o in outcomes)
    parked, unparked = sum(o.num_parked for o in outcomes), sum(o.num_unparked for o in outcomes)
    sys.stdout.write(
        f"{total} seeds, {len(failures)} failed, {total / seconds:.1f} seeds/s; {requests} requests, "
        f"{errors} clean errors, {retries} retries, "
        f"{preemptions} preemptions ({parked} parked, {unparked} unparked), "
        f"{sum(faults.values())} faults of {len(faults)} kinds\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
