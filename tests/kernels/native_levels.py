"""A fixture that runs a test at each level of native kernels that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from penstock.kernels.decoder_step import op as decoder_step
from penstock.kernels.digest import op as digest
from penstock.kernels.native import library
from penstock.kernels.quant_linear import op as quant_linear

_CACHES = (library.level, library._library, digest._native, quant_linear._native, decoder_step._native)


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """With the kernels of one level, or "off"; skips where they are not to be had."""
    if name != "off" and (name not in library.usable_levels() or library._path(name) is None):
        pytest.skip(f"no native kernels for {name} here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, name)
        _forget()
        yield
    _forget()


def _forget() -> None:
    for cached in _CACHES:
        cached.cache_clear()


@pytest.fixture(params=[*library.LEVELS])
def native_level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


@pytest.fixture(params=[*library.LEVELS, "off"])
def any_level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param
