"""`penstock chat` against prepared streams."""

from __future__ import annotations

import io
from typing import Any

import pytest

from penstock.cli.chat import Conversation, first_model, piece_of
from penstock.cli.errors import CliError
from penstock.cli.http_client import Server, _event_data
from penstock.cli.main import main

MODELS = {"data": [{"id": "tiny"}]}


def chunk(text: str | None) -> dict[str, object]:
    return {"choices": [{"delta": {} if text is None else {"content": text}}]}


def test_chat_streams_answers_and_sends_the_history(
    canned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n/reset\nthird\n/exit\nnever\n"))
    stream = canned.sse(
        {"choices": [{"delta": {"role": "assistant"}}]}, chunk("He"), chunk("y\x1b!"), chunk(None), {"choices": []}
    )
    answers = {"/v1/models": canned.json(MODELS), "/v1/chat/completions": stream}
    with canned.server(answers) as server:
        assert main(["chat", "--url", server.url, "--system", "short", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == "Hey!\nHey!\nHey!\n"
    bodies = [body for path, _, body in server.seen if path == "/v1/chat/completions"]
    assert [[message["content"] for message in body["messages"]] for body in bodies] == [
        ["short", "hello"],
        ["short", "hello", "Hey\x1b!", "again"],
        ["short", "third"],
    ]
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["stream"]) == ("tiny", 9, True)


def test_failed_turn_leaves_the_history_as_it_was(canned: Any) -> None:
    with canned.server({"/v1/chat/completions": canned.sse({"error": {"message": "overloaded"}})}) as server:
        conversation = Conversation(Server(server.url, None), {}, None)
        with pytest.raises(CliError, match="the answer broke off: overloaded"):
            list(conversation.ask("hello"))
    assert conversation.messages == []


def test_answer_left_early_counts_as_far_as_it_came(canned: Any) -> None:
    with canned.server({"/v1/chat/completions": canned.sse(chunk("one "), chunk("two"))}) as server:
        conversation = Conversation(Server(server.url, None), {}, None)
        answer = conversation.ask("count")
        assert next(answer) == "one "
        answer.close()
    assert [message["content"] for message in conversation.messages] == ["count", "one "]


def test_refused_chat_ends_a_script_with_an_error(
    canned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with canned.server({"/v1/chat/completions": canned.json({"error": {"message": "draining"}}, status=503)}) as server:
        assert main(["chat", "--url", server.url, "--model", "m"]) == 1
    assert "answered 503: draining\nhint: `penstock status`" in capsys.readouterr().err


def test_cluster_without_a_model_is_explained(canned: Any) -> None:
    with (
        canned.server({"/v1/models": canned.json({"data": []})}) as server,
        pytest.raises(CliError, match="serves no model"),
    ):
        first_model(Server(server.url, None))


@pytest.mark.parametrize(
    "event", [{}, {"choices": [{}]}, {"choices": 3}, [], None, "x", {"choices": [{"delta": None}]}]
)
def test_chunk_of_another_shape_is_one_clear_error(event: object) -> None:
    with pytest.raises(CliError, match="not a chat completion chunk"):
        piece_of(event)


def test_event_stream_skips_pings_joins_lines_and_stops_at_done() -> None:
    lines = [
        b": ping\n",
        b"\n",
        b"event: x\r\n",
        b"data: 1\r\n",
        b"data:2\r\n",
        b"\r\n",
        b"data: [DONE]\n",
        b"\n",
        b"data: 3\n",
        b"\n",
    ]
    assert list(_event_data(lines)) == [b"1\n2"]
