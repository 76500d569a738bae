"""What all tests share: where sources, data and the real model are, and that no test leaves a thread or a process."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.models import store

ROOT = Path(__file__).resolve().parent.parent
NOT_PRODUCT = {"setup.py", "tests", "benchmarks", "docs", "build", "dist"}
REQUIRE_DATA = os.environ.get("PENSTOCK_REQUIRE_DATA") == "1"

# One thread a process: workers run side by side, and sums come out in one order. Set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def python_files(root: Path) -> Iterator[Path]:
    """Every .py file of the repository, sorted; nothing from hidden, built or installed folders."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith((".", "__")) and not name.endswith(".egg-info") and name not in {"build", "dist"}
        )
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def absent(what: str) -> None:
    """Skip the test that needs `what`, or fail it where everything is required to be present."""
    if REQUIRE_DATA:
        pytest.fail(f"{what} (PENSTOCK_REQUIRE_DATA=1)")
    pytest.skip(what)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def all_sources() -> dict[str, str]:
    """Path relative to the repository → text, for every Python file, tests and benchmarks too."""
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in python_files(ROOT)}


@pytest.fixture(scope="session")
def product_sources(all_sources: dict[str, str]) -> dict[str, str]:
    """The same for the files that are installed."""
    return {path: text for path, text in all_sources.items() if path.split("/")[0] not in NOT_PRODUCT}


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The file of the default model, a real one; skips where it has not been pulled."""
    try:
        return store.resolve(store.DEFAULT_MODEL, download=False).path
    except ConfigError as err:
        absent(str(err))
        raise


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("gsm8k")` is the path of a public data set kept beside the repository; skips where there is none."""
    base = Path(os.environ.get("PENSTOCK_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (base / name).exists():
            absent(f"no data set {name!r}; set PENSTOCK_DATA")
        return base / name

    return find


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test that sets logging up leaves nothing behind: the stream it named is closed after it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _leaves_nothing_running() -> Iterator[None]:
    threads, children = set(threading.enumerate()), _children()
    yield
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon:
            thread.join(timeout=5)
            assert not thread.is_alive(), f"the test left thread {thread.name!r} running"
    left = {pid: _command(pid) for pid in _children() - children}
    # The standard library keeps one helper process for shared memory until the interpreter ends.
    left = {pid: command for pid, command in left.items() if command and "resource_tracker" not in command}
    assert not left, f"the test left processes running: {left}"


def _children() -> set[str]:
    """Pids of this process's children, by Linux's /proc; empty elsewhere."""
    found: set[str] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(task.read_text().split())
        except OSError:  # the thread has just ended
            continue
    return found


def _command(pid: str) -> str:
    """The command line of a living process; empty for one that is gone, or dead and not yet reaped."""
    try:
        name, state = Path("/proc", pid, "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
    return "" if state.split()[0] == "Z" else command or name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skips by reason in one line, so that a run without the model or a GPU does not pass for a full one."""
    reasons = Counter(
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    loud = {"yellow": True, "bold": True} if reasons else {}
    terminalreporter.write_line(f"skipped {sum(reasons.values())} tests{': ' + listed if listed else ''}", **loud)
