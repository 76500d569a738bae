"""Bugs that other systems have had, planted here one by one, and who catches them.

python -m penstock.testing.planted            the list
python -m penstock.testing.planted --run      plant each and tell who has caught it, and how fast
"""

from __future__ import annotations

import argparse
import sys
import time

from .bug import Bug
from .catalog import BUGS, KNOWN_BUGS


def _row(bug: Bug) -> str:
    return f"{bug.name:>14}  {bug.mirrors:<34}  {bug.catcher!s:<32}  {bug.what}"


def _run(bugs: list[Bug]) -> bool:
    """Plant each; True when all are caught by the one they should be caught by."""
    caught: list[Bug] = []
    for bug in bugs:
        start = time.perf_counter()
        verdict = bug.catcher.judge(bug.plant)
        seconds = time.perf_counter() - start
        caught += [bug] if verdict.caught else []
        sign = "caught" if verdict.caught else "MISSED"
        sys.stdout.write(f"{bug.name:>14}  {sign}  {seconds:5.2f} s  {bug.catcher!s:<32}  {verdict.text}\n")
        sys.stdout.flush()
    known = [bug for bug in bugs if bug.name in KNOWN_BUGS]
    own = [bug for bug in bugs if bug.name not in KNOWN_BUGS]
    sys.stdout.write(
        f"{sum(bug in caught for bug in known)} of {len(known)} caught, "
        f"and {sum(bug in caught for bug in own)} of {len(own)} of our own\n"
    )
    return len(caught) == len(bugs)


def main(argv: list[str] | None = None) -> int:
    """0 when every bug was caught by name."""
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.planted", description=__doc__.splitlines()[0])
    parser.add_argument("bugs", nargs="*", metavar="BUG", help="only these (default: all)")
    parser.add_argument("--run", action="store_true", help="plant them")
    args = parser.parse_args(argv)
    unknown = [name for name in args.bugs if name not in BUGS]
    if unknown:
        parser.error(f"no bug {unknown[0]!r}; choose from {', '.join(BUGS)}")
    bugs = [BUGS[name] for name in args.bugs or BUGS]
    if args.run:
        return int(not _run(bugs))
    for bug in bugs:
        sys.stdout.write(f"{_row(bug)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
