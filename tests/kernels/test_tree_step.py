"""Trees of drafted tokens in one step, beside each of their paths computed as a chain: the same bits natively, close in
torch.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.engine.batch import build_batch
from penstock.engine.draft_tree import MAX_TREE_ROWS, ROOT
from penstock.engine.interface import ScheduledSeq
from penstock.engine.model_runner import ModelRunner
from penstock.kernels.paged_attention.plan import SHORT_QUERY
from penstock.kernels.paged_attention.tree import CAUSAL

from .native_levels import native_level
from .test_decoder_step import Runs, config_of, tokens

__all__ = ["native_level"]

COMB = (-1, 0, 1, 2, -1, -1, 0, 1, 1)
BUSH = (-1, -1, 0, 1, 0, 3, 2, 5, 5, 4)


def paths(parents: tuple[int, ...]) -> list[list[int]]:
    """For each drafted token the drafted tokens up to it."""
    found: list[list[int]] = []
    for token, parent in enumerate(parents):
        found.append([*(found[parent] if parent != ROOT else []), token])
    return found


def drafted_step(runs: Runs, runner: ModelRunner, known: list[int], draft: list[int], parents: tuple[int, ...] = ()):
    """Logits [1 + drafted, vocab] behind the last of `known` and each drafted token, and the sequence."""
    stepper = runs.stepper()
    seq = stepper.add(known)
    if len(known) > 1:
        runs.step(runner, stepper, [stepper.schedule(seq, len(known) - 1)])
    seq.prompt_ids = [*known, *draft]
    stepper.schedule(seq)  # blocks for the drafted tokens too
    seq.prompt_ids = known
    entry = ScheduledSeq(seq, 1, tuple(draft), parents)
    return runner.run(build_batch([entry], runs.block_size)), seq


def check_paths(runs: Runs, length: int, parents: tuple[int, ...], *, exact: bool) -> None:
    known, draft = tokens(length, length), tokens(len(parents), 77)
    make = runs.runner if exact else lambda: torch_runner(runs)
    found, _ = drafted_step(runs, make(), known, draft, parents)
    for token, path in enumerate(paths(parents)):
        chain, _ = drafted_step(runs, make(), known, [draft[at] for at in path])
        if exact:
            assert torch.equal(found[0], chain[0]), (length, token)
            assert torch.equal(found[1 + token], chain[-1]), (length, token)
        else:
            assert (found[1 + token] - chain[-1]).abs().max() < 0.02, (length, token)


def torch_runner(runs: Runs) -> ModelRunner:
    runner = runs.runner()
    runner._step = None
    return runner


@pytest.mark.parametrize("parents", [COMB, BUSH, (-1,) * 15, (-1, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_a_tree_has_the_bits_of_its_path(
    native_level: str, dtype: torch.dtype, parents: tuple[int, ...]
) -> None:
    runs = Runs(config_of(head_dim=64), dtype, block_size=16)
    for length in (1, 16, 57, 65):
        check_paths(runs, length, parents, exact=True)


@pytest.mark.parametrize("length", [505, 511, 512])
def test_a_tree_across_two_parts_of_the_keys(native_level: str, length: int) -> None:
    check_paths(Runs(config_of(head_dim=64), torch.bfloat16, block_size=16), length, COMB, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_counts_the_tokens_of_a_path(native_level: str, dtype: torch.dtype) -> None:
    window = {"architecture": "mistral", "sliding_window": 9, "window_layers": (True, False, True), "head_dim": 64}
    runs = Runs(config_of(**window), dtype, block_size=4)
    for length in (5, 30, 62):
        check_paths(runs, length, BUSH, exact=True)
        check_paths(runs, length, (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 11, 12), exact=True)


@pytest.mark.parametrize("parents", [COMB, BUSH, (-1,) * 15], ids=str)
def test_torch_is_close_to_each_path(parents: tuple[int, ...]) -> None:
    for config in (config_of(), config_of(architecture="mistral", sliding_window=9, window_layers=(True, False, True))):
        for length in (1, 3, 30, 62):
            check_paths(Runs(config), length, parents, exact=False)


@pytest.mark.parametrize("is_native", [True, False])
def test_trees_chains_and_prompts_stand_side_by_side(is_native: bool) -> None:
    runs = Runs(config_of(head_dim=64), torch.bfloat16, block_size=16)
    make = runs.runner if is_native else lambda: torch_runner(runs)
    runner, alone, entries = make(), [], []
    stepper = runs.stepper()
    for length, draft, parents in ((40, 9, COMB), (60, 5, ()), (7, 0, ()), (130, 10, BUSH)):
        known = tokens(length, length)
        alone.append(
            drafted_step(runs, runs.runner() if is_native else torch_runner(runs), known, tokens(draft), parents)[0]
        )
        seq = stepper.add(known)
        runs.step(runner, stepper, [stepper.schedule(seq, length - 1)])
        seq.prompt_ids = [*known, *tokens(draft)]
        stepper.schedule(seq)
        seq.prompt_ids = known
        entries.append(ScheduledSeq(seq, 1, tuple(tokens(draft)), parents))
    prompt = stepper.schedule(stepper.add(tokens(50, 50)))
    together = runner.run(build_batch([*entries, prompt], runs.block_size))
    expected = torch.cat([*alone, runs.last(make(), tokens(50, 50), [50])])
    if is_native:
        assert torch.equal(together, expected)
    else:
        assert (together - expected).abs().max() < 0.1


def test_a_chain_told_as_a_tree_has_the_bits_of_a_chain(native_level: str) -> None:
    runs = Runs(config_of(head_dim=64), torch.bfloat16, block_size=16)
    known, draft = tokens(70), tokens(6, 1)
    chain, _ = drafted_step(runs, runs.runner(), known, draft)
    tree, _ = drafted_step(runs, runs.runner(), known, draft, (-1, 0, 1, 2, 3, 4))
    assert torch.equal(chain, tree)


def test_a_row_that_sees_its_sibling_is_noticed() -> None:
    """The checks above can fail: with causal rows the second of two siblings sees the first."""
    runs = Runs(config_of(head_dim=64), torch.bfloat16, block_size=16)
    stepper, known = runs.stepper(), tokens(20)
    seq = stepper.add(known)
    runner = runs.runner()
    runs.step(runner, stepper, [stepper.schedule(seq, 19)])
    batch = build_batch([replace(stepper.schedule(seq), draft=(5, 6), parents=(-1, -1))], 16)
    right = runner.run(batch).clone()
    assert batch.tree is not None
    batch.tree[:] = CAUSAL
    assert not torch.equal(runner.run(batch)[2], right[2])


def test_what_is_no_tree_is_refused() -> None:
    assert MAX_TREE_ROWS == SHORT_QUERY
    runs = Runs(config_of())
    order = random.Random(0)
    for parents in ((0, 1), (-1, -2), (-1,), (-1, order.randrange(2, 9))):
        stepper = runs.stepper()
        seq = stepper.add([1, 2, 3])
        stepper.schedule(seq)
        with pytest.raises(InternalError, match="a parent stands before its children"):
            build_batch([ScheduledSeq(seq, 3, (7, 8), parents)], 8)
    seq = stepper.add([1])
    seq.block_table = list(range(9))  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="a tree has up to 16 tokens"):
        build_batch([ScheduledSeq(seq, 1, (7,) * 16, (-1,) * 16)], 4)
