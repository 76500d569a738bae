"""The native kernels, in a library built at install for each level of instructions; the best one that runs here.

Plain C functions over addresses, called through ctypes, which lets other threads run meanwhile. Each has a twin in
Python that serves where there is no library. `PENSTOCK_NATIVE=off` goes without, `PENSTOCK_NATIVE=avx2` (or another
level) takes that one.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ...core.errors import ConfigError

logger = logging.getLogger(__name__)

ABI = 2
VARIABLE = "PENSTOCK_NATIVE"
_AVX2 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
# Best first: what a processor must have, in the words of /proc/cpuinfo.
LEVELS = {"avx512bf16": _AVX512 | {"avx512_bf16"}, "avx512": _AVX512, "avx2": _AVX2}

ADDRESS, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

calls: Counter[str] = Counter()  # by function: the proof that a fast path is taken


class Function:
    """A function of the library that returns nothing."""

    def __init__(self, library: ctypes.CDLL, name: str, arguments: Sequence[type]) -> None:
        self._name = name
        self._function = getattr(library, f"penstock_{name}")
        self._function.argtypes, self._function.restype = list(arguments), None

    def __call__(self, *arguments: float | None) -> None:
        calls[self._name] += 1
        self._function(*arguments)


def function(name: str, arguments: Sequence[type]) -> Function | None:
    """`penstock_<name>` with these types of arguments; None where there is no library, which is said once."""
    found = _library()
    return None if found is None else Function(found, name, arguments)


@cache
def level() -> str | None:
    """The level in use, of LEVELS; None without a library. Raises ConfigError for a wish that cannot be met."""
    wish = os.environ.get(VARIABLE, "")
    if wish == "off":
        return None
    if not wish:
        return next((name for name in usable_levels() if _path(name) is not None), None)
    if wish not in LEVELS or wish not in usable_levels() or _path(wish) is None:
        there = [name for name in usable_levels() if _path(name) is not None]
        raise ConfigError(f"{VARIABLE}={wish}: here are {', '.join(there) or 'no native kernels'}; or say off")
    return wish


def usable_levels() -> list[str]:
    """What this processor can run, best first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    return [name for name, needed in LEVELS.items() if needed <= flags]


@cache
def _library() -> ctypes.CDLL | None:
    name = level()
    if name is None:
        if os.environ.get(VARIABLE) != "off":
            logger.warning(
                "no native kernels for this machine: torch computes, slower; a C++ compiler at install builds them"
            )
        return None
    library = ctypes.CDLL(str(_path(name)))
    if library.penstock_abi() != ABI:
        logger.warning("the native kernels are of another version; install again (pip install -e .); torch computes")
        return None
    return library


def _path(name: str) -> Path | None:
    folder = Path(__file__).parent
    paths = (folder / f"_{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)
