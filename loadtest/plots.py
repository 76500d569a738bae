"""Small SVG plots for the report: lines, steps and stacked bars. Text in, text out; nothing is loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 42
COLOURS = ("#1f6fb4", "#d1602b", "#2f8f57", "#8a56a8", "#b0a030", "#c2416b", "#4aa3a8", "#777777")
MAX_POINTS = 1500

Point = tuple[float, float]
_HALO = 'stroke="#fff" stroke-width="3" paint-order="stroke"'  # text stays readable over lines


@dataclass(frozen=True, slots=True)
class Line:
    """Points in the order of x. `is_dots` draws them unconnected, `has_dots` on the line."""

    name: str
    points: Sequence[Point]
    is_dots: bool = False
    is_step: bool = False
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Labels with units; `has_log_x` for quantities over several powers of ten."""

    x: str
    y: str
    has_log_x: bool = False
    y_max: float | None = None
    marks: tuple[tuple[str, float], ...] = ()  # (name, x) of vertical lines: the targets


@dataclass(frozen=True, slots=True)
class _Frame:
    axes: Axes
    x_low: float
    x_high: float
    y_high: float

    def x(self, value: float) -> float:
        low, high, value = self.x_low, self.x_high, max(self.x_low, min(self.x_high, value))
        if self.axes.has_log_x:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (1 - min(1.0, max(0.0, value / self.y_high))) * (HEIGHT - TOP - BOTTOM)


def plot(title: str, lines: Sequence[Line], axes: Axes) -> str:
    """An <svg> with its title; a sentence instead where there is nothing to draw."""
    lines = [line for line in lines if line.points]
    if not lines:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    frame = _frame(lines, axes)
    parts = [_grid(frame)]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        parts.append("" if line.is_dots else _path(frame, line, colour))
        parts.append(_dots(frame, line, colour) if line.is_dots or line.has_dots else "")
        parts.append(_legend(number, line.name, colour))
    parts += [_mark(frame, name, at, number) for number, (name, at) in enumerate(axes.marks)]
    return _svg(title, "".join(parts))


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str) -> str:
    """Stacked horizontal bars: (label, [(part, value)]); parts keep their colours by place."""
    total = max((sum(max(0.0, value) for _, value in parts) for _, parts in rows), default=0.0)
    if total <= 0:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    scale = (WIDTH - LEFT - 60) / total
    drawn = []
    for line, (label, parts) in enumerate(rows):
        x, y = float(LEFT), 30 + line * 30
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        for number, (name, value) in enumerate(parts):
            width = max(0.0, value) * scale
            tip = f"<title>{escape(name)}: {value:.3g} {escape(unit)}</title>"
            colour = COLOURS[number % len(COLOURS)]
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="20" fill="{colour}">{tip}</rect>')
            x += width
        drawn.append(f'<text x="{x + 4:.1f}" y="{y + 14}">{sum(v for _, v in parts):.3g} {escape(unit)}</text>')
    names = [name for name, _ in rows[0][1]]
    bottom = 30 + len(rows) * 30
    for number, name in enumerate(names):
        x, y = LEFT + (number % 4) * 140, bottom + 8 + (number // 4) * 18
        drawn.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        drawn.append(f'<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>')
    return _svg(title, "".join(drawn), bottom + 20 + (len(names) - 1) // 4 * 18)


def cumulative(values: Sequence[float]) -> list[Point]:
    """(value, share of values that are no larger), thinned to what can be seen."""
    ordered = sorted(values)
    return thinned([(value, (i + 1) / len(ordered)) for i, value in enumerate(ordered)])


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS, evenly taken, the last always among them."""
    stride = -(-len(points) // MAX_POINTS) if points else 1
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(lines: Sequence[Line], axes: Axes) -> _Frame:
    xs = [x for line in lines for x, _ in line.points] + [at for _, at in axes.marks]
    y_high = axes.y_max or max((y for line in lines for _, y in line.points), default=1.0) * 1.05 or 1.0
    low, high = min(xs), max(xs)
    if axes.has_log_x:
        positive = [x for x in xs if x > 0] or [1.0]
        low, high = min(positive), max(positive)
        return _Frame(axes, low / 1.05, high * 1.05, y_high)
    low = 0.0 if low >= 0 and low < high / 2 else low
    return _Frame(axes, low, high if high > low else low + 1.0, y_high)


def _grid(frame: _Frame) -> str:
    parts = []
    for value in ticks(0.0, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _log_ticks(frame) if frame.axes.has_log_x else ticks(frame.x_low, frame.x_high, 7):
        x = frame.x(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(frame.axes.x)}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
        f"{escape(frame.axes.y)}</text>"
    )
    return "".join(parts)


def _log_ticks(frame: _Frame) -> list[float]:
    if frame.x_high < 10 * frame.x_low:
        return ticks(frame.x_low, frame.x_high, 7)
    powers = range(math.floor(math.log10(frame.x_low)), math.ceil(math.log10(frame.x_high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in found if frame.x_low <= value <= frame.x_high]
    return inside if len(inside) <= 9 else [value for value in inside if f"{value:e}"[0] == "1"]


def _path(frame: _Frame, line: Line, colour: str) -> str:
    points = [(frame.x(x), frame.y(y)) for x, y in line.points]
    steps = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        steps.append(f"H{x:.1f}V{y:.1f}" if line.is_step else f"L{x:.1f} {y:.1f}")
    return f'<path d="{"".join(steps)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _dots(frame: _Frame, line: Line, colour: str) -> str:
    return "".join(
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.2" fill="{colour}" fill-opacity="0.6"/>'
        for x, y in line.points
    )


def _mark(frame: _Frame, name: str, at: float, number: int) -> str:
    x, y = frame.x(at), TOP + 10 + 14 * number
    side, anchor = (-3, "end") if x > WIDTH - 120 else (3, "start")
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#b00" stroke-dasharray="4 3"/>'
        f'<text x="{x + side:.1f}" y="{y}" text-anchor="{anchor}" fill="#b00" {_HALO}>{escape(name)}</text>'
    )


def _legend(number: int, name: str, colour: str) -> str:
    y = HEIGHT - BOTTOM - 12 - 16 * number
    x = WIDTH - RIGHT - 8
    return f'<text x="{x}" y="{y}" text-anchor="end" fill="{colour}" {_HALO}>{escape(name)}</text>'


def _svg(title: str, inside: str, height: int = HEIGHT) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" xmlns="http://www.w3.org/2000/svg">{inside}</svg></figure>'
    )
