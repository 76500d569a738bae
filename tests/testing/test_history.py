"""The checker of histories knows nothing of the system; here it is shown to see each kind of wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from penstock.protocol.sampling import SamplingParams
from penstock.testing.fake_engine import expected_tokens
from penstock.testing.history import (
    Accept,
    Cancel,
    End,
    Event,
    HistoryWriter,
    Tokens,
    check_history,
    main,
    read_history,
    reference_answers,
)

PROMPT, PARAMS = [5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True, seed=3)
ANSWER, REASON = expected_tokens(PROMPT, PARAMS)
ACCEPT = Accept("r1", PROMPT, PARAMS)


def good() -> list[Event]:
    return [
        ACCEPT,
        Tokens("r1", 0, 0, ANSWER[:2]),
        Tokens("r1", 0, 2, ANSWER[2:], REASON),
        End("r1"),
    ]


def test_history_of_a_right_run_holds() -> None:
    checker = check_history(good())
    assert checker.violations == []
    assert (checker.num_requests, checker.num_tokens) == (1, 4)


def test_history_cut_short_by_an_error_or_a_cancel_holds() -> None:
    assert check_history([*good()[:2], End("r1", "node_lost")]).violations == []
    assert check_history([*good()[:2], Cancel("r1"), End("r1")]).violations == []
    assert check_history([*good()[:2], Cancel("r1", 0), End("r1")]).violations == []


BAD: dict[str, tuple[str, Callable[[list[Event]], list[Event]]]] = {
    "missing end": ("I1 r1: accepted and never ended", lambda h: h[:-1]),
    "double end": ("I1 r1: ended twice", lambda h: [*h, End("r1")]),
    "tokens after the end": ("I1 r1 choice 0: tokens after its end", lambda h: [*h, Tokens("r1", 0, 4, [1])]),
    "tokens after the finish": ("I1 r1 choice 0: tokens after", lambda h: [*h[:3], Tokens("r1", 0, 4, [1]), h[3]]),
    "end without a finish": ("I1 r1: ended well, but choice 0", lambda h: [h[0], h[1], h[3]]),
    "cancelled by nobody": ("I1 r1: ended as cancelled", lambda h: [h[0], h[1], End("r1", "cancelled")]),
    "accepted twice": ("I1 r1: accepted twice", lambda h: [h[0], *h]),
    "unknown request": ("I1 r2: end of a request that nobody", lambda h: [*h, End("r2")]),
    "unknown choice": ("I1 r1: tokens of choice 7", lambda h: [*h[:3], Tokens("r1", 7, 0, [1]), h[3]]),
    "gap": ("I3 r1 choice 0: a gap", lambda h: [h[0], h[1], Tokens("r1", 0, 3, ANSWER[3:], REASON), h[3]]),
    "duplicate": ("I3 r1 choice 0: a duplicate", lambda h: [h[0], h[1], Tokens("r1", 0, 1, ANSWER[1:], REASON), h[3]]),
    "reordered": ("I3 r1 choice 0: a gap", lambda h: [h[0], h[2], h[1], h[3]]),
    "wrong token": ("I2 r1 choice 0: token 1 is", lambda h: [h[0], Tokens("r1", 0, 0, [ANSWER[0], -1]), *h[2:]]),
    "too short": ("I2 r1 choice 0: ended by length", lambda h: [h[0], Tokens("r1", 0, 0, ANSWER[:1], "length"), h[3]]),
    "too long": ("I2 r1 choice 0: token 4 is", lambda h: [*h[:2], Tokens("r1", 0, 2, [*ANSWER[2:], 9], REASON), h[3]]),
    "wrong reason": ("I2 r1 choice 0: ended by stop", lambda h: [*h[:2], Tokens("r1", 0, 2, ANSWER[2:], "stop"), h[3]]),
}


@pytest.mark.parametrize("kind", BAD)
def test_history_that_is_wrong_is_reported_by_name(kind: str) -> None:
    expected, spoil = BAD[kind]
    violations = check_history(spoil(good())).violations
    assert violations, f"{kind} goes unnoticed"
    assert violations[0].startswith(expected)


def test_history_is_compared_with_a_reference() -> None:
    expect = reference_answers([ACCEPT, Tokens("r1", 0, 0, [1, 2]), Tokens("r1", 0, 2, [3], "stop"), End("r1")])
    right: list[Event] = [ACCEPT, Tokens("r1", 0, 0, [1]), Tokens("r1", 0, 1, [2, 3], "stop"), End("r1")]
    assert check_history(right, expect).violations == []
    assert check_history(good(), expect).violations[0].startswith("I2 r1 choice 0: token 0")
    other = msgspec.structs.replace(ACCEPT, prompt_ids=[9])
    assert check_history([other, *right[1:]], expect).violations == ["I2 r1 choice 0: the reference does not have it"]


def test_history_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "history"
    with open(path, "wb") as file:
        writer = HistoryWriter(file)
        writer.accept("r1", PROMPT, PARAMS)
        writer.tokens("r1", 0, 0, ANSWER, REASON)
        writer.cancel("r1", 0)
        writer.end("r1", "node_lost")
    events = list(read_history(path))
    assert events == [ACCEPT, Tokens("r1", 0, 0, ANSWER, REASON), Cancel("r1", 0), End("r1", "node_lost")]


def test_history_command_reports_by_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history"

    def write(events: list[Event]) -> None:
        path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))

    write(good())
    assert main([str(path)]) == 0
    assert "1 requests, 4 tokens: I1, I2 and I3 hold" in capsys.readouterr().out
    assert main([str(path), "--reference", str(path)]) == 0
    write(good()[:-1])
    assert main([str(path)]) == 1
    assert "I1 r1: accepted and never ended" in capsys.readouterr().out
    path.write_bytes(b'{"event": "accept"}\n')
    assert main([str(path)]) == 2
    assert f"{path}:1: not an event" in capsys.readouterr().err
