"""One measured figure of `benchmarks/gpu.py`, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from penstock.benchmarks.quick import say
from penstock.kernels.gpu_limits import Work, captured, seconds, seconds_at_best


@dataclass(frozen=True, slots=True)
class Figure:
    """seconds: of one call. at_best: what the limits measured in this run allow. bar: the share that is asked for.

    others: seconds that somebody else's code takes for the same.
    """

    name: str
    seconds: float
    at_best: float
    bar: float | None = None
    others: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.at_best / self.seconds

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return "no bar"
        return "met" if self.share >= self.bar else "missed"

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"share": round(self.share, 4), "verdict": self.verdict}


def measure(
    name: str,
    run: Callable[[], object],
    work: Work,
    bar: float | None = None,
    others: dict[str, Callable[[], object]] | None = None,
) -> Figure:
    """Each as a CUDA graph, so that what the host does to launch it is not in the figure."""
    times = {other: seconds(captured(call)) for other, call in (others or {}).items()}
    figure = Figure(name, seconds(captured(run)), seconds_at_best(work), bar, times)
    say(f"{name}: {figure.seconds * 1e6:.1f} us, {figure.share:.1%} of the limit ({figure.verdict})")
    return figure


def table(figures: list[Figure]) -> str:
    lines = ["| | time, us | share of the limit | bar | | others, us |", "|---|---|---|---|---|---|"]
    for figure in figures:
        bar = "" if figure.bar is None else f"{figure.bar:.0%}"
        others = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in figure.others.items())
        lines.append(
            f"| {figure.name} | {figure.seconds * 1e6:.1f} | {figure.share:.1%} | {bar} | {figure.verdict} | {others} |"
        )
    return "\n".join(lines)
