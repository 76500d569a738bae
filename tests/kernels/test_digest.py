"""Digests: the native kernel at every level, beside the xxhash library."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from penstock.core.errors import InternalError
from penstock.kernels.digest import op, reference
from penstock.kernels.native import library

from .native_levels import any_level

__all__ = ["any_level"]

SIZES = (1, 16, 240, 241, 256, 300, 1023, 1024, 1025, 1088, 1089, 2048, 4095, 12288, 12289, 65536)


def places_of(sizes: tuple[int, ...], gap: int) -> list[tuple[int, int]]:
    starts = np.cumsum([0, *(size + gap for size in sizes[:-1])]).tolist()
    return list(zip(starts, sizes, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0, 1, 63])
def test_digest_of_one_block_is_that_of_the_library(any_level: str, size: int, shift: int) -> None:
    region = memoryview(random.Random(size).randbytes(size + 128))
    assert op.digests(region, [(shift, size)]) == reference.block_digest(region[shift : shift + size])


@pytest.mark.parametrize("shift", [0, 1, 64])
def test_copy_brings_the_bytes_the_digests_and_nothing_else(any_level: str, shift: int) -> None:
    rng = random.Random(5)
    places = places_of(SIZES[3:], gap=7)
    total = places[-1][0] + places[-1][1]
    source = memoryview(rng.randbytes(total))
    target = bytearray(b"\xaa" * (total + 256))
    base = -np.frombuffer(target, np.uint8).ctypes.data % 64 + shift
    to = [(base + offset, size) for offset, size in places]
    found = op.copied(source, places, memoryview(target), to)
    assert found == reference.digests(source, places)
    expected = bytearray(b"\xaa" * len(target))
    reference.copied(source, places, memoryview(expected), to)
    assert target == expected


def test_native_kernel_is_taken_where_it_is(any_level: str) -> None:
    before = library.calls["digest"]
    op.digests(memoryview(bytes(4096)), [(0, 4096)])
    assert library.calls["digest"] - before == (any_level != "off")
    assert op.copies_natively() == (any_level != "off")


def test_no_blocks_have_no_digests(any_level: str) -> None:
    assert op.digests(memoryview(b""), []) == b""


@pytest.mark.parametrize("place", [(-1, 10), (0, 301), (299, 2), (10, -1)])
def test_block_outside_the_region_is_refused(any_level: str, place: tuple[int, int]) -> None:
    region = memoryview(bytearray(300))
    with pytest.raises(InternalError, match="outside a region of 300 bytes"):
        op.digests(region, [place])
    with pytest.raises(InternalError, match="outside a region of 300 bytes"):
        op.copied(region, [(0, 10)], region, [place])


def test_copy_between_other_sizes_is_refused(any_level: str) -> None:
    region = memoryview(bytearray(300))
    with pytest.raises(InternalError, match="other sizes"):
        op.copied(region, [(0, 10)], region, [(20, 11)])


@pytest.mark.parametrize(("wish", "answer"), [("off", "None"), ("", "True"), ("mmx", "ConfigError")])
def test_variable_chooses_the_level(wish: str, answer: str) -> None:
    if not library.usable_levels():
        pytest.skip("this processor has no level of native kernels")
    code = (
        "from penstock.kernels.native import library\n"
        "from penstock.core.errors import ConfigError\n"
        "try: found = library.level()\n"
        "except ConfigError as err: found = 'ConfigError'; assert 'PENSTOCK_NATIVE=mmx' in str(err)\n"
        f"print(found if {wish!r} else found in library.LEVELS)\n"
    )
    environment = {library.VARIABLE: wish, "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == answer
