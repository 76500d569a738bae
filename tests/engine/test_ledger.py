"""The ledger of owners, by example; and that a word never becomes visible before the bytes it gives away."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from penstock.core.errors import ConfigError, InternalError
from penstock.core.ids import BlockId
from penstock.engine.kv_memory import KVMemory, fix_size
from penstock.engine.ledger import MAX_OWNERS, MAX_TAG, Entry, Ledger, ledger_bytes, tag_of
from penstock.engine.shared_files import ENVIRONMENT, SharedFiles, inherited_fds
from penstock.engine.shared_pool import SharedPool

SHARES = [3, 2, 4]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


def fresh(shares: list[int] = SHARES) -> Ledger:
    return Ledger(memoryview(bytearray(ledger_bytes(shares))), shares)


def test_ledger_of_zeros_gives_every_worker_its_share_in_order() -> None:
    ledger = fresh()
    assert [ledger.blocks_of(owner) for owner in (1, 2, 3)] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert ledger.counts() == SHARES == [ledger.share(owner) for owner in (1, 2, 3)]
    assert ledger.entry(4) == Entry(2, 0)
    assert [ledger.is_owner(number) for number in (-1, 0, 1, 3, 4)] == [False, False, True, True, False]


def test_given_blocks_change_their_owner_and_nothing_else() -> None:
    words = bytearray(ledger_bytes(SHARES))
    ledger = Ledger(memoryview(words), SHARES)
    ledger.give(ids(2, 0), 1, 3, tag=7)
    assert [ledger.entry(block_id) for block_id in (0, 1, 2)] == [(3, 7), (1, 0), (3, 7)]
    assert ledger.counts() == [1, 2, 6]
    assert words == (3 << 24 | 7).to_bytes(4, sys.byteorder) + bytes(4) + words[:4] + bytes(24)
    ledger.give(ids(2), 3, 1)
    assert ledger.entry(2) == Entry(1, 0)
    again = Ledger(memoryview(words), SHARES)
    assert again.blocks_of(3) == [0, 5, 6, 7, 8], "the words are all there is to know"


@pytest.mark.parametrize(
    ("block_ids", "giver", "taker", "tag"),
    [([3], 1, 2, 0), ([0, 3], 1, 2, 0), ([0], 1, 1, 0), ([0], 1, 4, 0), ([0], 1, 0, 0), ([0], 1, 2, MAX_TAG + 1)],
)
def test_gift_that_nobody_may_make_raises_and_gives_nothing(
    block_ids: list[int], giver: int, taker: int, tag: int
) -> None:
    ledger = fresh()
    with pytest.raises(InternalError, match="gives blocks"):
        ledger.give(ids(*block_ids), giver, taker, tag)
    assert ledger.counts() == SHARES


@pytest.mark.parametrize("block_id", [-1, 9, 1 << 40])
def test_block_outside_the_memory_raises(block_id: int) -> None:
    with pytest.raises(IndexError, match="of 9"):
        fresh().entry(block_id)


@pytest.mark.parametrize("shares", [[], [1] * (MAX_OWNERS + 1), [4, 4]])
def test_ledger_of_another_size_or_too_many_owners_is_refused(shares: list[int]) -> None:
    with pytest.raises(InternalError, match="a ledger of 36 bytes"):
        Ledger(memoryview(bytearray(36)), shares)


def test_tags_are_never_zero_and_differ_for_neighbours() -> None:
    for generation in (0, 1, MAX_TAG - 1, MAX_TAG, MAX_TAG + 1, 1 << 40):
        assert 1 <= tag_of(generation) <= MAX_TAG
        assert tag_of(generation) != tag_of(generation + 1)


def test_highest_owner_and_tag_fit_a_word() -> None:
    ledger = fresh([1] * MAX_OWNERS)
    ledger.give(ids(0), 1, MAX_OWNERS, MAX_TAG)
    assert ledger.entry(0) == Entry(MAX_OWNERS, MAX_TAG)


@needs_linux
@pytest.mark.parametrize(("is_late", "wrong"), [(False, 0), (True, 1)], ids=["bytes first", "planted: bytes late"])
def test_word_is_never_seen_before_the_bytes_it_gives_away(is_late: bool, wrong: int) -> None:
    """Two processes pass one block to and fro; each writes new bytes, then the word, and checks the other's bytes."""
    fd = os.memfd_create("passed", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    words = f"from {__name__} import pass_to_and_fro; raise SystemExit(pass_to_and_fro({fd}, 2, {is_late}))"
    child = subprocess.Popen([sys.executable, "-c", words], pass_fds=[fd], stdin=subprocess.PIPE)
    try:
        found = pass_to_and_fro(fd, 1, is_late, lambda: child.poll() is None)
        assert (found, child.wait(60)) == (wrong, wrong)
    finally:
        child.kill()
        child.communicate()
        os.close(fd)


def pass_to_and_fro(fd: int, me: int, is_late: bool, lives: Callable[[], bool] = lambda: True) -> int:
    """1 when a word came with bytes other than its own, else 0. With tag t each of 64 numbers in the block is t."""
    shared = mmap.mmap(fd, 4096)
    content = memoryview(shared)[1024 : 1024 + 64 * 8].cast("Q")
    ledger = Ledger(memoryview(shared)[:8], [1, 1])
    wrong = False
    for _ in range(2_000):
        while ledger.entry(0).owner != me:
            os.sched_yield()
            if not lives():
                return 1
        tag = ledger.entry(0).tag
        wrong = wrong or any(value != tag for value in content)
        for at in range(0 if not is_late else 64, 64):
            content[at] = tag + 1
        ledger.give(ids(0), me, 3 - me, tag + 1)
    return int(wrong)


# ---- the files ----


@needs_linux
def test_workers_see_each_others_blocks_and_the_files_outlive_them() -> None:
    files = SharedFiles()
    first, second = SharedPool(files.fds, 1, SHARES), SharedPool(files.fds, 2, SHARES)
    mine, theirs = first.attach(2, 16), second.attach(2, 16)
    assert (mine.num_blocks, mine.block_bytes, len(mine.region)) == (9, 32, 9 * 32)
    mine.block(8)[:] = b"x" * 32
    first.ledger.give(ids(0), 1, 2)
    assert theirs.block(8) == b"x" * 32
    assert second.ledger.entry(0) == Entry(2, 0)
    for memory, pool in ((mine, first), (theirs, second)):
        memory.close()
        pool.close()
        pool.close()
    again = SharedPool(files.fds, 2, SHARES)
    memory = again.attach(2, 16)
    assert memory.block(8) == b"x" * 32
    assert again.ledger.blocks_of(2) == [0, 3, 4]
    memory.close()
    again.close()
    files.close()
    files.close()


@needs_linux
def test_number_in_use_is_refused_until_its_holder_has_gone() -> None:
    files = SharedFiles()
    pool = SharedPool(files.fds, 1, SHARES)
    with pytest.raises(ConfigError, match="another process already is worker number 1"):
        SharedPool(files.fds, 1, SHARES)
    pool.close()
    SharedPool(files.fds, 1, SHARES).close()
    files.close()


@needs_linux
def test_killed_worker_leaves_its_number_to_the_next() -> None:
    files = SharedFiles()
    give = f"SharedPool({files.fds}, 1, SHARES).ledger.give(ids(1), 1, 2)"
    words = f"from {__name__} import *; {give}; os.kill(os.getpid(), 9)"
    child = subprocess.run([sys.executable, "-c", words], pass_fds=files.fds, check=False)
    assert child.returncode == -9
    pool = SharedPool(files.fds, 1, SHARES)
    assert pool.ledger.blocks_of(1) == [0, 2]
    pool.close()
    files.close()


@needs_linux
@pytest.mark.parametrize("number", [0, 4])
def test_number_outside_the_topology_is_refused(number: int) -> None:
    files = SharedFiles()
    with pytest.raises(ConfigError, match=f"worker number {number} of 3"):
        SharedPool(files.fds, number, SHARES)
    files.close()


@needs_linux
def test_files_keep_the_size_they_were_first_given() -> None:
    files = SharedFiles()
    pool = SharedPool(files.fds, 1, SHARES)
    pool.attach(2, 16).close()
    with pytest.raises(ConfigError, match="the shared pool has 288 bytes, this worker needs 576; restart"):
        pool.attach(4, 16)
    with pytest.raises(ConfigError, match="the ledger of the shared pool has 36 bytes, this worker needs 24"):
        SharedPool(files.fds, 2, [3, 3])
    with pytest.raises(PermissionError):
        os.ftruncate(files.fds[0], 1)
    pool.close()
    files.close()


@needs_linux
@pytest.mark.parametrize(("other", "fits"), [(64, True), (96, False)])
def test_of_two_that_size_a_file_at_once_the_first_wins(
    other: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, truncate = SharedFiles(), os.ftruncate

    def overtaken(fd: int, nbytes: int) -> None:
        monkeypatch.setattr(os, "ftruncate", truncate)
        fix_size(fd, other, "the file")
        truncate(fd, nbytes)

    monkeypatch.setattr(os, "ftruncate", overtaken)
    if fits:
        fix_size(files.fds[0], 64, "the file")
    else:
        with pytest.raises(ConfigError, match="the file has 96 bytes, this worker needs 64"):
            fix_size(files.fds[0], 64, "the file")
    assert os.fstat(files.fds[0]).st_size == other
    files.close()


@needs_linux
def test_own_memory_is_sealed_as_before() -> None:
    memory = KVMemory(2, 2, 16, staging_bytes=64)
    fd = memory.fileno()
    assert fd is not None
    assert (os.fstat(fd).st_size, len(memory.region), len(memory.buffer)) == (128, 128, 64)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 256)
    memory.close()


@needs_linux
def test_environment_names_the_descriptors() -> None:
    files = SharedFiles()
    assert inherited_fds(files.environment()) == files.fds
    files.close()


@pytest.mark.parametrize("text", [None, "", "3", "3,4,5", "a,b", "-1,2"])
def test_environment_without_descriptors_is_refused(text: str | None) -> None:
    with pytest.raises(ConfigError, match="start the workers through `penstock serve`"):
        inherited_fds({} if text is None else {ENVIRONMENT: text})
