"""I10: a client that does not read is felt by nobody else, at the router's shell and at the connection."""

from __future__ import annotations

from penstock.testing.slow_reader import check_unread_stream


def test_unread_stream_delays_no_other() -> None:
    check_unread_stream()
