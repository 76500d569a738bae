"""Memory of a long training run."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Give the system what malloc keeps. Every batch has other sizes, and glibc holds pieces of all of them until the
    process has several times what it uses. Does nothing with another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
