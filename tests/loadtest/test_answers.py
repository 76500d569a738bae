"""Streams of any server: cut anywhere, several tokens a chunk or half of one, with and without usage."""

from __future__ import annotations

import json

import pytest

from penstock.loadtest.answers import AnswerReader, kind_of_status
from penstock.loadtest.record import Asked, ErrorKind, Record
from penstock.loadtest.sse import EventReader, EventTooLarge

STREAM = b': ping\n\nevent: x\ndata: {"a": 1}\n\ndata:{"b":\ndata: 2}\r\n\r\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_wherever_the_bytes_are_cut(size: int) -> None:
    reader = EventReader()
    found = [event for at in range(0, len(STREAM), size) for event in reader.feed(STREAM[at : at + size])]
    assert found == [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]
    assert not reader.is_inside


def test_event_that_has_not_ended_is_inside() -> None:
    reader = EventReader()
    assert reader.feed(b"data: {") == []
    assert reader.is_inside


def test_event_without_end_is_refused() -> None:
    with pytest.raises(EventTooLarge):
        EventReader().feed(b"data: " + b"x" * (17 << 20))


def chat(
    text: str | None = None, usage: int | None = None, finish: str | None = None, **delta: object
) -> dict[str, object]:
    said = delta | ({} if text is None else {"content": text})
    return {
        "choices": [{"index": 0, "delta": said, "finish_reason": finish}],
        "usage": None if usage is None else {"prompt_tokens": 9, "completion_tokens": usage},
    }


def read(*events: object, done: bool = True) -> tuple[Record, AnswerReader]:
    """Events a second apart, the first at 1 s; intended and sent at 0."""
    record = Record(Asked(0, 0.0, 9, 16))
    reader = AnswerReader(record)
    for second, event in enumerate(events, 1):
        reader.read(json.dumps(event).encode(), float(second))
    if done:
        reader.read(b"[DONE]", float(len(events) + 1))
    record.end_s = len(events) + 1.0
    reader.end()
    return record, reader


def test_role_chunk_of_a_chat_is_not_the_first_token() -> None:
    record, reader = read(chat("", role="assistant"), chat("Hi"), chat(" you"), chat(finish="stop"))
    assert record.ttft_s == 2.0
    assert reader.text == "Hi you"
    assert record.finish_reason == "stop"
    assert record.is_completed


def test_several_tokens_in_a_chunk_are_counted_by_the_servers_usage() -> None:
    record, _ = read(chat("a b c", 3), chat(" d", 4), chat(" e f g h", 8), chat(finish="length", usage=8))
    assert [one.tokens for one in record.arrivals] == [3, 1, 4]
    assert record.output_tokens == 8
    assert record.first_tokens == 3
    assert record.tpot_s == pytest.approx((4.0 - 1.0) / 5)  # the end says when the last token was there
    assert record.gaps_s == [1.0, 1.0]


def test_part_of_a_token_brings_text_and_no_token() -> None:
    record, _ = read(chat("a", 1), chat("\u00e4", 1), chat("b", 2), chat(finish="stop", usage=2))
    assert [one.tokens for one in record.arrivals] == [1, 0, 1]
    assert record.gaps_s == [2.0]
    assert record.output_tokens == 2


def test_token_without_text_counts_and_is_not_the_first() -> None:
    record, _ = read(chat("", 1), chat("whole", 2), chat(" x", 3), chat(finish="stop", usage=3))
    assert record.ttft_s == 2.0
    assert record.first_tokens == 2
    assert record.output_tokens == 3


def test_usage_at_the_end_alone_gives_the_total() -> None:
    record, _ = read(chat("a b"), chat(" c"), chat(finish="stop"), {"choices": [], "usage": {"completion_tokens": 5}})
    assert [one.tokens for one in record.arrivals] == [None, None]
    assert record.output_tokens == 5
    assert record.first_tokens == 1
    assert record.tpot_s == pytest.approx(2.0 / 4)


def test_without_usage_chunks_are_counted() -> None:
    record, _ = read(chat("a"), chat("b"), chat("c", finish="stop"))
    assert record.output_tokens == 3
    assert record.use.completion_tokens is None


def test_one_token_has_no_tpot() -> None:
    record, _ = read(chat("a", 1), chat(finish="length", usage=1))
    assert record.tpot_s is None
    assert record.ttft_s == 1.0


@pytest.mark.parametrize(
    "delta", [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "x"}]
)
def test_reasoning_and_tool_calls_are_output(delta: dict[str, object]) -> None:
    record, _ = read({"choices": [{"index": 0, "delta": delta}]}, chat(finish="stop"))
    assert record.ttft_s == 1.0


def test_details_of_usage_and_phases_are_kept() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 2, "resumed": 0},
    }
    report = {"prefill_ms": 12.5, "attempts": 1, "name": "x"}
    record, _ = read(chat("a"), chat(finish="stop"), {"choices": [], "usage": usage, "penstock": report})
    use = record.use
    assert (use.prompt_tokens, use.cached_tokens, use.accepted_tokens, use.rejected_tokens) == (100, 64, 4, 2)
    assert record.phases == {"prefill_ms": 12.5, "attempts": 1.0}


def test_error_event_breaks_the_stream() -> None:
    record, _ = read(chat("a"), {"error": {"message": "worker lost"}}, done=False)
    assert record.failure is not None
    assert record.failure.kind is ErrorKind.BROKEN_STREAM
    assert "worker lost" in record.failure.detail


def test_stream_that_just_stops_is_broken() -> None:
    record, _ = read(chat("a"), chat("b"), done=False)
    assert record.failure is not None
    assert record.failure.kind is ErrorKind.BROKEN_STREAM


def test_finish_reason_without_done_is_an_end() -> None:
    assert read(chat("a"), chat(finish="stop"), done=False)[0].is_completed


def test_stream_without_a_token_is_empty() -> None:
    record, _ = read(chat("", role="assistant"), chat(finish="stop"))
    assert record.failure is not None
    assert record.failure.kind is ErrorKind.EMPTY


def test_event_that_is_no_chunk_breaks_the_stream() -> None:
    record, _ = read(chat("a"), ["not", "a", "chunk"])
    assert record.failure is not None
    assert "no chunk" in record.failure.detail


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "refused"), (400, "bad_request"), (404, "bad_request"), (500, "server_error"), (503, "server_error")],
)
def test_status_has_its_kind(status: int, kind: str) -> None:
    assert kind_of_status(status) == kind
