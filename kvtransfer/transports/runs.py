"""Adjacent bytes are one copy: lists of spans, merged where they touch and cut where a piece would be too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..bulk import Span


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in the same order, with neighbours joined."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].offset + found[-1].nbytes == span.offset:
            found[-1] = Span(found[-1].offset, found[-1].nbytes + span.nbytes)
        else:
            found.append(span)
    return found


def chunks(spans: Sequence[Span], most_bytes: int, most_spans: int | None = None) -> Iterator[list[Span]]:
    """Lists of merged spans, `most_bytes` together, less where `most_spans` are reached and at the end."""
    chunk: list[Span] = []
    room = most_bytes
    for offset, nbytes in merged(spans):
        start, stop = offset, offset + nbytes
        while start < stop:
            length = min(room, stop - start)
            chunk.append(Span(start, length))
            start, room = start + length, room - length
            if not room or len(chunk) == most_spans:
                yield chunk
                chunk, room = [], most_bytes
    if chunk:
        yield chunk


def total_bytes(spans: Iterable[Span]) -> int:
    return sum(span.nbytes for span in spans)


def paired(source: Sequence[Span], target: Sequence[Span], most_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(source offset, target offset, number of bytes) for pieces that are contiguous on both sides.

    Both lists have the same total; raises ValueError when they have not.
    """
    left, right = iter(merged(source)), iter(merged(target))
    here, there = next(left, None), next(right, None)
    while here is not None and there is not None:
        nbytes = min(here.nbytes, there.nbytes, most_bytes)
        yield here.offset, there.offset, nbytes
        here = _rest(here, nbytes) or next(left, None)
        there = _rest(there, nbytes) or next(right, None)
    if here is not None or there is not None:
        raise ValueError(f"{total_bytes(source)} bytes into {total_bytes(target)}")


def _rest(span: Span, nbytes: int) -> Span | None:
    return Span(span.offset + nbytes, span.nbytes - nbytes) if span.nbytes > nbytes else None
