"""Reads the events of one streamed answer: which brought tokens, how many, how it ended."""

from __future__ import annotations

import msgspec

from .record import Arrival, ErrorKind, Failure, Record, Use

DONE = b"[DONE]"
MAX_DETAIL = 300


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct, frozen=True):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class ChunkUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    def use(self) -> Use:
        prompt = self.prompt_tokens_details or PromptDetails()
        completion = self.completion_tokens_details or CompletionDetails()
        return Use(
            self.prompt_tokens,
            self.completion_tokens,
            prompt.cached_tokens,
            completion.accepted_prediction_tokens,
            completion.rejected_prediction_tokens,
        )


class Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[object] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        """True with text, reasoning or a piece of a tool call; a chat's first event has a role and nothing else."""
        delta = self.delta or Delta()
        return bool(self.text or delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class Chunk(msgspec.Struct, frozen=True):
    choices: tuple[ChunkChoice, ...] = ()
    usage: ChunkUsage | None = None
    error: object = None
    penstock: dict[str, object] | None = None


class AnswerReader:
    """Fills a record from events. `text` is the answer, for the next turn of a conversation."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._decoder = msgspec.json.Decoder(Chunk)
        self._counted = 0  # completion tokens by the latest usage
        self._texts: list[str] = []
        self.is_done = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def read(self, data: bytes, now_s: float) -> None:
        """One event. What is wrong with it ends in `record.failure`."""
        if data.strip() == DONE:
            self.is_done = True
            return
        try:
            chunk = self._decoder.decode(data)
        except msgspec.MsgspecError as err:
            self._fail(f"an event that is no chunk: {err}")
            return
        if chunk.error is not None:
            self._fail(f"an error event: {msgspec.json.encode(chunk.error).decode()}")
        self._count(chunk, now_s)
        if chunk.penstock is not None:
            self._record.phases = phases_of(chunk.penstock)

    def end(self) -> None:
        """The server has closed the stream, or [DONE] has come."""
        record = self._record
        if record.failure is not None:
            return
        if not self.is_done and record.finish_reason is None:
            self._fail("the stream ended without a finish reason and without [DONE]")
        elif record.first_s is None:
            record.failure = Failure(ErrorKind.EMPTY, "the stream ended without a token", 200)

    def _count(self, chunk: Chunk, now_s: float) -> None:
        record = self._record
        has_output = any(choice.has_output for choice in chunk.choices)
        finish = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), None)
        tokens: int | None = None
        if chunk.usage is not None and chunk.usage.completion_tokens is not None:
            tokens = max(0, chunk.usage.completion_tokens - self._counted)
            self._counted = max(self._counted, chunk.usage.completion_tokens)
        if chunk.usage is not None:
            record.use = chunk.usage.use()
        record.finish_reason = finish or record.finish_reason
        if not chunk.choices:
            return
        if has_output or tokens:
            record.arrivals.append(Arrival(now_s, tokens))
            record.chunk_tokens += 1
        if has_output:
            self._texts += [choice.text or (choice.delta or Delta()).content or "" for choice in chunk.choices]
            if record.first_s is None:
                record.first_s = now_s
        if record.first_s is not None and (has_output or tokens or finish):
            record.last_s = now_s

    def _fail(self, why: str) -> None:
        if self._record.failure is None:
            self._record.failure = Failure(ErrorKind.BROKEN_STREAM, why[:MAX_DETAIL], 200)


def phases_of(report: dict[str, object]) -> dict[str, float]:
    """The numbers of Penstock's own part of an answer: milliseconds (`…_ms`) and counts."""
    return {
        name: float(value)
        for name, value in report.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def kind_of_status(status: int) -> ErrorKind:
    """The error kind of an HTTP status of 400 and above."""
    if status == 429:
        return ErrorKind.REFUSED
    return ErrorKind.SERVER_ERROR if status >= 500 else ErrorKind.BAD_REQUEST
