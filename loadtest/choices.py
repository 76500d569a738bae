"""A user's choice of workload and arrivals, turned into a workload that fits the model, and a schedule for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..core.errors import ConfigError
from . import prompts, traces, workloads
from .arrivals import Arrivals, replay
from .lengths import Lengths
from .names import TEXTS, Kind, Shape
from .plan import Conversation, Window, Workload
from .runner import Schedule

ArrivalShape = Shape | Literal["trace", "closed"]
DEFAULT_COUNT = 100
TEMPLATE_RESERVE_TOKENS = 64  # kept free in the window for a chat template


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of what is made up, in tokens."""

    prompt: Lengths = field(default_factory=lambda: Lengths(512, 512))
    output: Lengths = field(default_factory=lambda: Lengths(128, 128))
    num_prefixes: int = 8
    prefix_tokens: int = 512
    turns: Lengths = field(default_factory=lambda: Lengths(2, 6))
    think_s: float = 0.0
    is_aged: bool = True


@dataclass(frozen=True, slots=True)
class WorkloadChoice:
    """`count` conversations (None: the whole file, or DEFAULT_COUNT); `scale` multiplies a trace's lengths."""

    kind: Kind = "random"
    path: Path | None = None
    count: int | None = None
    sizes: Sizes = field(default_factory=Sizes)
    scale: float = 1.0
    is_spreading: bool = True
    is_clipping: bool = True
    is_shuffled: bool = False
    has_turns: bool = True
    is_exact_length: bool | None = None  # None: where lengths are planned, not where the text is real

    def build(self, max_model_len: int | None, seed: int, is_chat: bool) -> Workload:
        """Raises ConfigError for a file that does not hold what it should, or of which nothing fits."""
        window = Window(max_model_len, self.is_clipping, TEMPLATE_RESERVE_TOKENS if is_chat else 0)
        rows = self._rows(window, seed)
        found = len(rows)
        if self.is_shuffled:
            rows = prompts.shuffled(rows, seed)
        rows = self._counted(rows)
        name = self.kind if self.path is None else f"{self.kind} ({self.path.name})"
        workload = window.fit(rows, name, self.wants_exact_length)
        if not workload.conversations:
            raise ConfigError(
                f"{name}: none of {len(rows)} rows fits a window of {max_model_len} tokens; "
                "lower the lengths or --length-scale"
            )
        return replace(workload, num_repeated=max(0, len(rows) - found))

    @property
    def wants_exact_length(self) -> bool:
        return self.kind not in TEXTS if self.is_exact_length is None else self.is_exact_length

    def _rows(self, window: Window, seed: int) -> list[Conversation]:
        sizes, count = self.sizes, self.count or DEFAULT_COUNT
        match self.kind:
            case "random":
                return workloads.random_prompts(count, sizes.prompt, sizes.output, seed)
            case "prefix":
                return workloads.shared_prefixes(
                    count, sizes.num_prefixes, sizes.prefix_tokens, sizes.prompt, sizes.output, seed
                )
            case "chat":
                shape = workloads.ChatShape(sizes.turns, sizes.prompt, sizes.output, sizes.think_s, sizes.is_aged)
                return workloads.chats(count, shape, seed)
        return self._from_file(window, seed)

    def _from_file(self, window: Window, seed: int) -> list[Conversation]:
        if self.path is None:
            raise ConfigError(f"--file: the workload {self.kind} is read from a file; give its path")
        asked = prompts.Asked(self.sizes.output.high, self.has_turns)
        scale = traces.Scale(self.scale)
        match self.kind:
            case "sharegpt":
                return prompts.sharegpt(self.path, asked)
            case "documents":
                room = None if window.max_tokens is None else window.max_tokens - window.reserve
                return prompts.documents(self.path, asked, None if room is None else room - asked.num_output_tokens)
            case "azure":
                return traces.azure(self.path, seed, scale)
            case "burstgpt":
                return traces.burstgpt(self.path, seed, scale)
            case "mooncake":
                return traces.mooncake(self.path, seed, scale, self.is_spreading)
            case "lengths":
                return traces.length_pairs(self.path, seed, scale)
        return prompts.jsonl(self.path, asked)

    def _counted(self, rows: list[Conversation]) -> list[Conversation]:
        """The first `count`; begun again from the first where there are fewer."""
        if self.count is None or not rows:
            return rows
        times = -(-self.count // len(rows))
        last_s, num_gaps = rows[-1].at_s, max(1, len(rows) - 1)
        if times == 1 or last_s is None:
            return (rows * times)[: self.count]
        length_s = last_s * (num_gaps + 1) / num_gaps  # the trace begins again a mean gap after its end
        again = [replace(one, at_s=(one.at_s or 0.0) + length_s * turn) for turn in range(times) for one in rows]
        return again[: self.count]


@dataclass(frozen=True, slots=True)
class ArrivalChoice:
    """How requests arrive: by `shape` at `rate`, as the trace says (`trace`), or so many at once (`concurrency`)."""

    shape: ArrivalShape = "poisson"
    rate: float = 1.0
    burstiness: float = 1.0
    end_rate: float = 0.0
    concurrency: int = 0
    speed: float = 1.0
    duration_s: float | None = None

    @property
    def is_open_loop(self) -> bool:
        return self.shape != "closed"

    @property
    def is_steady(self) -> bool:
        """True where the rate is meant to be the same throughout: only then does growing latency mean saturation."""
        return self.shape in ("poisson", "gamma", "constant", "trace")

    def with_rate(self, rate: float, workload: Workload) -> ArrivalChoice:
        """The same at another rate; a trace is played faster or slower."""
        if self.shape != "trace":
            return replace(self, rate=rate)
        times = [one.at_s or 0.0 for one in workload.conversations]
        native = (len(times) - 1) / (max(times) - min(times)) if len(times) > 1 and max(times) > min(times) else 1.0
        return replace(self, speed=rate / native)

    def schedule(self, workload: Workload, seed: int) -> tuple[Workload, Schedule]:
        """The schedule, and the workload without what would come after `duration_s`. Raises ConfigError."""
        if self.shape == "closed":
            return workload, Schedule(None, self.concurrency, self.duration_s)
        times = self._times(workload.conversations, seed)
        if self.duration_s is not None:
            times = [t for t in times if t <= self.duration_s]
            if not times:
                raise ConfigError(f"--duration: nothing arrives within {self.duration_s:g} s; raise it or the rate")
            workload = replace(workload, conversations=workload.conversations[: len(times)])
        return workload, Schedule(times)

    def _times(self, conversations: Sequence[Conversation], seed: int) -> list[float]:
        if self.shape == "trace":
            stated = [one.at_s for one in conversations if one.at_s is not None]
            if len(stated) < len(conversations):
                raise ConfigError("--arrivals trace: this workload has no times; give --request-rate instead")
            if any(b < a for a, b in itertools.pairwise(stated)):
                raise ConfigError("--arrivals trace: rows are not in the order of their times; leave --shuffle out")
            return replay(stated, self.speed)
        assert self.shape != "closed"
        return Arrivals(self.shape, self.rate, self.burstiness, self.end_rate).times(len(conversations), seed)

    def describe(self) -> str:
        match self.shape:
            case "closed":
                return f"closed loop, {self.concurrency} at once"
            case "burst":
                return "offline burst: everything at once, TTFT says nothing about a service"
            case "trace":
                return f"the trace's own times, {self.speed:g} times as fast"
            case "linear-ramp" | "exponential-ramp":
                return f"{self.shape} from {self.rate:g} to {self.end_rate:g} requests/s"
            case "gamma":
                return f"gamma, {self.rate:g} requests/s, burstiness {self.burstiness:g}"
            case _:
                return f"{self.shape}, {self.rate:g} requests/s"
