"""Streams over HTTP that are kept going: when one ends the next begins, and every token's time and value is noted."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .serving import Serving

LOGPROB_TOLERANCE = 1e-3
TIMEOUT_S = 180.0


@dataclass(slots=True)
class ChoiceText:
    """All that the client sees of one choice."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[str]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        if choice["logprobs"] is not None:
            self.tokens += choice["logprobs"]["tokens"]
            self.logprobs += choice["logprobs"]["token_logprobs"]
            self.top += [sorted(chances) for chances in choice["logprobs"]["top_logprobs"]]

    def difference(self, other: ChoiceText) -> str:
        """Empty when the two are equal, logprobs within the tolerance; else what differs first."""
        for name in ("text", "tokens", "finish_reason", "top"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine!r} in place of {theirs!r}"
        gaps = [abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True)]
        worst = max(gaps, default=0.0)
        return "" if worst <= LOGPROB_TOLERANCE else f"logprobs differ by {worst:g}"


@dataclass(slots=True)
class StreamRecord:
    """One stream: which body it had, when tokens came (monotonic seconds), what it said."""

    body: int
    started: float
    times: list[float] = field(default_factory=list)
    choices: dict[int, ChoiceText] = field(default_factory=dict)
    ended: float | None = None
    error: str = ""
    resumed: int = 0
    attempts: int = 0

    def gap_after(self, moment: float, within_s: float) -> float:
        """The longest wait for a token that overlaps [moment, moment + within_s]; 0 when no two tokens lie around."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((late - early for early, late in pairs if late > moment and early < moment + within_s), default=0.0)

    def was_live(self, moment: float) -> bool:
        return self.started <= moment and (self.ended is None or self.ended >= moment)


def read_stream(
    cluster: Serving, number: int, body: dict[str, Any], record: StreamRecord | None = None
) -> StreamRecord:
    """Run one streamed completion to its end; what goes wrong is in `error`, never raised."""
    record = record or StreamRecord(number, time.monotonic())
    try:
        for chunk in cluster.stream("/v1/completions", body | {"stream_options": {"include_usage": True}}, TIMEOUT_S):
            _note(record, chunk)
        if not record.error and any(choice.finish_reason is None for choice in record.choices.values()):
            record.error = "the stream broke off"
    except (OSError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = time.monotonic()
    return record


def _note(record: StreamRecord, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        record.error = str(chunk["error"])
        return
    for choice in chunk["choices"]:
        record.choices.setdefault(choice["index"], ChoiceText()).add(choice)
        record.times.append(time.monotonic())
    if chunk.get("usage") and not chunk["choices"]:
        record.resumed = chunk["usage"]["completion_tokens_details"]["resumed"]
        record.attempts = chunk["penstock"]["attempts"]


class LiveStreams:
    """`num_streams` streams at all times between `start` and `stop`. No body runs twice at one time."""

    def __init__(self, cluster: Serving, bodies: list[dict[str, Any]], num_streams: int, seed: int) -> None:
        if len(bodies) <= num_streams:
            raise ValueError(f"{num_streams} streams need more than {num_streams} bodies, got {len(bodies)}")
        self._cluster, self._bodies = cluster, bodies
        order = list(range(len(bodies)))
        random.Random(seed).shuffle(order)
        self._order = deque(order)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.records: list[StreamRecord] = []
        self._threads = [threading.Thread(target=self._run, name=f"stream-{i}") for i in range(num_streams)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin no further stream, and wait for those that run."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def num_streaming(self) -> int:
        """Streams that have got their first token and not their last."""
        with self._lock:
            return sum(record.ended is None and bool(record.times) for record in self.records)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = self._order.popleft()
                record = StreamRecord(number, time.monotonic())
                self.records.append(record)
            read_stream(self._cluster, number, self._bodies[number], record)
            with self._lock:
                self._order.append(number)


def undisturbed(cluster: Serving, bodies: list[dict[str, Any]], num_streams: int) -> list[StreamRecord]:
    """Each body once, `num_streams` at a time, while nothing goes wrong."""
    records: dict[int, StreamRecord] = {}
    numbers: Iterator[int] = iter(range(len(bodies)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            records[number] = read_stream(cluster, number, bodies[number])

    threads = [threading.Thread(target=work, name=f"undisturbed-{i}") for i in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [records[number] for number in range(len(bodies))]
