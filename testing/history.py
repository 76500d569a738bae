"""A history of what clients saw, one JSON object a line, and a checker that knows nothing of the system (I1, I2, I3).

    python -m penstock.testing.history FILE                      of requests served by FakeEngine, which it recomputes
    python -m penstock.testing.history FILE --reference FILE     against the history of a run without faults

    {"event": "accept", "request": "r1", "prompt_ids": [1, 2], "params": {"max_tokens": 4}}
    {"event": "tokens", "request": "r1", "choice": 0, "index": 0, "token_ids": [7, 9], "finish_reason": null}
    {"event": "cancel", "request": "r1", "choice": null}         null: the whole request
    {"event": "end", "request": "r1", "error": null}             or the code of its error

After Jepsen: record what every client did, check it afterwards, apart from the system (https://jepsen.io).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from ..protocol.sampling import SamplingParams
from .fake_engine import expected_tokens


class Accept(msgspec.Struct, frozen=True, tag="accept", tag_field="event", forbid_unknown_fields=True):
    request: str
    prompt_ids: list[int]
    params: SamplingParams


class Tokens(msgspec.Struct, frozen=True, tag="tokens", tag_field="event", forbid_unknown_fields=True):
    request: str
    choice: int
    index: int
    token_ids: list[int]
    finish_reason: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="event", forbid_unknown_fields=True):
    request: str
    choice: int | None = None


class End(msgspec.Struct, frozen=True, tag="end", tag_field="event", forbid_unknown_fields=True):
    request: str
    error: str | None = None


Event = Accept | Tokens | Cancel | End
Answer = tuple[list[int], str]  # token ids, finish reason
Expect = Callable[[Accept, int], Answer | None]  # of one choice; None where it is not known

_decoder = msgspec.json.Decoder(Event)


class HistoryWriter:
    """Appends to `file`, an event a line. Any client may write one: a simulated one, a load generator, a test."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def accept(self, request: str, prompt_ids: list[int], params: SamplingParams) -> None:
        self._write(Accept(request, prompt_ids, params))

    def tokens(self, request: str, choice: int, index: int, token_ids: list[int], finish_reason: str | None) -> None:
        self._write(Tokens(request, choice, index, token_ids, finish_reason))

    def cancel(self, request: str, choice: int | None = None) -> None:
        self._write(Cancel(request, choice))

    def end(self, request: str, error: str | None = None) -> None:
        self._write(End(request, error))

    def _write(self, event: Event) -> None:
        self._file.write(msgspec.json.encode(event) + b"\n")


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    is_cancelled: bool = False
    is_broken: bool = False  # said once, then not again for each token


@dataclass(slots=True)
class _Request:
    accept: Accept
    choices: list[_Choice]
    is_cancelled: bool = False
    ends: int = 0


class Checker:
    """Reads events in order; `violations` are sentences that start with the name of what broke."""

    def __init__(self, expect: Expect) -> None:
        self._expect = expect
        self._requests: dict[str, _Request] = {}
        self.violations: list[str] = []

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for item in self._requests.values() for choice in item.choices)

    def take(self, event: Event) -> None:
        if isinstance(event, Accept):
            if event.request in self._requests:
                self._say("I1", event.request, "accepted twice")
            self._requests[event.request] = _Request(event, [_Choice() for _ in range(event.params.n)])
            return
        item = self._requests.get(event.request)
        if item is None:
            self._say("I1", event.request, f"{type(event).__name__.lower()} of a request that nobody accepted")
            return
        match event:
            case Tokens():
                self._on_tokens(item, event)
            case Cancel(choice=None):
                item.is_cancelled = True
            case Cancel(choice=int() as number) if number < len(item.choices):
                item.choices[number].is_cancelled = True
            case End():
                self._on_end(item, event)

    def finish(self) -> None:
        """The history is over: every request has had its end."""
        for name, item in self._requests.items():
            if item.ends == 0:
                self._say("I1", name, "accepted and never ended")

    # ---- inside ----

    def _on_tokens(self, item: _Request, event: Tokens) -> None:
        if not 0 <= event.choice < len(item.choices):
            self._say("I1", event.request, f"tokens of choice {event.choice} of {len(item.choices)}")
            return
        choice, where = item.choices[event.choice], f"{event.request} choice {event.choice}"
        if item.ends or choice.finish_reason is not None:
            self._say("I1", where, "tokens after its end")
            return
        if event.index != len(choice.token_ids):
            kind = "a gap" if event.index > len(choice.token_ids) else "a duplicate"
            self._say("I3", where, f"{kind}: index {event.index} after {len(choice.token_ids)} tokens")
            choice.is_broken = True
        choice.token_ids += event.token_ids
        choice.finish_reason = event.finish_reason
        if not choice.is_broken:
            self._compare(item, event.choice, where)

    def _compare(self, item: _Request, number: int, where: str) -> None:
        answer, choice = self._expect(item.accept, number), item.choices[number]
        if answer is None:
            self._say("I2", where, "the reference does not have it")
            choice.is_broken = True
            return
        token_ids, reason = answer
        if choice.token_ids != token_ids[: len(choice.token_ids)]:
            pairs = zip(choice.token_ids, token_ids, strict=False)
            at = next((i for i, (one, other) in enumerate(pairs) if one != other), len(token_ids))
            self._say(
                "I2", where, f"token {at} is {choice.token_ids[at]}, the fault-free run has {token_ids[at : at + 1]}"
            )
            choice.is_broken = True
        elif choice.finish_reason is not None and (choice.finish_reason, len(choice.token_ids)) != (
            reason,
            len(token_ids),
        ):
            found = f"{choice.finish_reason} after {len(choice.token_ids)} tokens"
            self._say("I2", where, f"ended by {found}, the fault-free run by {reason} after {len(token_ids)}")

    def _on_end(self, item: _Request, event: End) -> None:
        item.ends += 1
        if item.ends > 1:
            self._say("I1", event.request, "ended twice")
        elif event.error is None and not item.is_cancelled:
            for number, choice in enumerate(item.choices):
                if choice.finish_reason is None and not choice.is_cancelled:
                    self._say("I1", event.request, f"ended well, but choice {number} has no finish")
        elif event.error == "cancelled" and not item.is_cancelled:
            self._say("I1", event.request, "ended as cancelled, and nobody cancelled it")

    def _say(self, name: str, where: str, what: str) -> None:
        self.violations.append(f"{name} {where}: {what}")


def read_history(path: Path) -> Iterator[Event]:
    """The events in `path`; raises ValueError that names a line which is none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield _decoder.decode(line)
            except msgspec.DecodeError as err:
                raise ValueError(f"{path}:{number}: not an event of a history: {err}") from err


def fake_engine_answers(accept: Accept, choice: int) -> Answer:
    return expected_tokens(accept.prompt_ids, accept.params, choice)


def reference_answers(events: Iterable[Event]) -> Expect:
    """What each choice was in a run without faults; a request is known by its id, prompt and parameters."""
    accepts: dict[str, Accept] = {}
    answers: dict[tuple[str, int], Answer] = {}
    for event in events:
        if isinstance(event, Accept):
            accepts[event.request] = event
        elif isinstance(event, Tokens):
            token_ids, _ = answers.get((event.request, event.choice), ([], ""))
            answers[event.request, event.choice] = ([*token_ids, *event.token_ids], event.finish_reason or "")

    def expect(accept: Accept, choice: int) -> Answer | None:
        return answers.get((accept.request, choice)) if accepts.get(accept.request) == accept else None

    return expect


def check_history(events: Iterable[Event], expect: Expect = fake_engine_answers) -> Checker:
    checker = Checker(expect)
    for event in events:
        checker.take(event)
    checker.finish()
    return checker


def main(argv: list[str] | None = None) -> int:
    """0 when everything in the history holds."""
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.history", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the history")
    parser.add_argument("--reference", type=Path, help="the history of the same requests in a run without faults")
    args = parser.parse_args(argv)
    try:
        expect = reference_answers(read_history(args.reference)) if args.reference else fake_engine_answers
        checker = check_history(read_history(args.file), expect)
    except (OSError, ValueError) as err:
        sys.stderr.write(f"{err}\n")
        return 2
    for violation in checker.violations:
        sys.stdout.write(f"{violation}\n")
    verdict = f"{len(checker.violations)} violations" if checker.violations else "I1, I2 and I3 hold"
    sys.stdout.write(f"{checker.num_requests} requests, {checker.num_tokens} tokens: {verdict}\n")
    return int(bool(checker.violations))


if __name__ == "__main__":
    raise SystemExit(main())
