"""Codes and messages cut to what the wire allows, so that a long error text never becomes a bad frame."""

from __future__ import annotations

from ..core.errors import TransferFailed

MAX_CODE, MAX_TEXT = 64, 1000  # bounds of Code and Text in protocol.messages


def safe_code(code: str) -> str:
    """Never empty: the empty code means success."""
    return code[:MAX_CODE] or TransferFailed.code


def safe_text(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
