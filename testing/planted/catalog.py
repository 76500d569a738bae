"""All planted bugs by name: the known ones by number, and a few of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from .bug import Bug, Plant
from .drafts import DRAFT_BUGS
from .handoffs import HANDOFF_BUGS
from .routers import ROUTER_BUGS
from .routing import ROUTING_BUGS
from .workers import WORKER_BUGS

NUM_KNOWN = 38

_ALL = [*HANDOFF_BUGS, *WORKER_BUGS, *DRAFT_BUGS, *ROUTING_BUGS, *ROUTER_BUGS]
_KNOWN = sorted((bug for bug in _ALL if bug.name.isdigit()), key=lambda bug: int(bug.name))
BUGS: dict[str, Bug] = {bug.name: bug for bug in [*_KNOWN, *(bug for bug in _ALL if not bug.name.isdigit())]}
KNOWN_BUGS = {name: bug for name, bug in BUGS.items() if name.isdigit()}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Run with bug `name` in place."""
    with BUGS[name].plant():
        yield


def plant_of(name: str | None) -> Plant:
    """What `run_seeds` takes, importable from any process; without a name nothing is planted."""
    return partial(planted, name) if name else nullcontext
