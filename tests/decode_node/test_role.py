"""The decode role alone: local prefill, finish reasons, cancel, bad input."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.errors import BadRequest
from penstock.core.ids import WorkerKey
from penstock.decode_node.local import LocalRunner
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.effects import PeerLost, PeerUp
from penstock.protocol.messages import Abort, AttemptFailed, ChoiceState, Output, StartDecode, pack_ids
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import WorkerCore
from penstock.worker.role import Tell

from .test_handoff import KEY, ME, PEER, proven

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def run(
    prompt: list[int], params: SamplingParams, num_blocks: int = 64
) -> tuple[dict[int, list[int]], dict[int, str | None]]:
    runner = LocalRunner(FakeEngine(num_blocks), FakeClock(), max_batch_tokens=8)
    tokens: dict[int, list[int]] = {c: [] for c in range(params.n)}
    reasons: dict[int, str | None] = {}
    for item in runner.stream(prompt, params):
        assert item.index == len(tokens[item.choice])
        tokens[item.choice] += [t.token_id for t in item.tokens]
        reasons[item.choice] = item.finish_reason
        runner.core.check_invariants()
    runner.core.check_invariants()
    assert runner.core.pool.num_free_blocks == runner.core.pool.num_blocks
    return tokens, reasons


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 9, 31])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_local_run_any_prompt_length_gives_the_expected_tokens(num_prompt: int, temperature: float) -> None:
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=11)
    prompt = list(range(1, num_prompt + 1))
    tokens, reasons = run(prompt, params)
    assert (tokens[0], reasons[0]) == expected_tokens(prompt, params)


def test_local_run_n_choices_each_has_its_own_stream() -> None:
    params = SamplingParams(max_tokens=6, n=4, seed=3, ignore_eos=True)
    tokens, _ = run(PROMPT, params)
    assert [tokens[c] for c in range(4)] == [expected_tokens(PROMPT, params, c)[0] for c in range(4)]
    assert len({tuple(t) for t in tokens.values()}) == 4


def test_local_run_n_choices_in_a_tiny_pool_preempts_and_still_agrees() -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=3, ignore_eos=True)
    tokens, _ = run(PROMPT, params, num_blocks=6)
    assert [tokens[c] for c in range(3)] == [expected_tokens(PROMPT, params, c)[0] for c in range(3)]


def test_local_run_stop_token_ends_the_choice_and_is_not_output() -> None:
    free = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
    full, _ = expected_tokens(PROMPT, free)
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0, stop_token_ids=(full[3],))
    tokens, reasons = run(PROMPT, params)
    assert (tokens[0], reasons[0]) == (full[:3], "stop")


def role(engine: FakeEngine | None = None, pool: BlockPool | None = None) -> DecodeRole:
    engine = engine or FakeEngine()
    return DecodeRole(ME, engine.spec, pool or BlockPool(64, 4), DestinationTable(5.0), KEY)


def start(request_id: str = "r", *, attempt: int = 1, ticket: bytes | None = None, **changes: Any) -> StartDecode:
    values: dict[str, Any] = {
        "prompt_ids": pack_ids(PROMPT),
        "params": SamplingParams(max_tokens=4),
        "choices": [ChoiceState(0)],
        "timeout_s": 10.0,
    }
    if ticket is not None:
        values |= {"ticket": ticket, "prefill_worker": PEER.worker_id, "prefill_epoch": PEER.epoch}
    message = StartDecode(request_id, attempt, **(values | changes))
    return message if ticket is None else proven(message)


def failures(decode: DecodeRole) -> list[AttemptFailed]:
    return [e.message for e in decode.take_effects() if isinstance(e, Tell) and isinstance(e.message, AttemptFailed)]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prompt_ids": b""}, "no tokens"),
        ({"prompt_ids": pack_ids([5000])}, "vocabulary"),
        ({"prompt_ids": b"abc"}, "int32"),
        ({"params": SamplingParams(max_tokens=1 << 19)}, "holds"),
        ({"params": SamplingParams(logit_bias={9999: 1.0})}, "vocabulary"),
        ({"choices": [ChoiceState(0), ChoiceState(0)]}, "twice"),
        ({"choices": [ChoiceState(0, pack_ids([1, 2, 3, 4]))]}, "max_tokens"),
    ],
)
def test_start_bad_input_fails_only_that_attempt(changes: dict[str, Any], word: str) -> None:
    decode = role()
    decode.on_command(start("good"), 0.0)
    decode.on_command(start("bad", **changes), 0.0)
    [failed] = failures(decode)
    assert (failed.request_id, failed.retriable) == ("bad", False)
    assert word in failed.message
    assert [k.request_id for k in decode.active()] == ["good"]


def test_start_twice_is_counted_and_ignored() -> None:
    decode = role()
    decode.on_command(start(), 0.0)
    decode.on_command(start(), 0.0)
    assert decode.load().stale_messages == 1
    assert len(decode.active()) == 1


def test_start_beyond_the_bound_is_refused_and_may_be_tried_elsewhere() -> None:
    engine = FakeEngine()
    decode = DecodeRole(ME, engine.spec, BlockPool(64, 4), DestinationTable(5.0), KEY, max_requests=1)
    decode.on_command(start("a"), 0.0)
    decode.on_command(start("b"), 0.0)
    [failed] = failures(decode)
    assert (failed.request_id, failed.code, failed.retriable) == ("b", "overloaded", True)
    decode.on_command(Abort("a", 1), 0.0)
    decode.on_command(start("c"), 0.0)
    assert [key.request_id for key in decode.active()] == ["c"]


def test_abort_before_start_wins() -> None:
    decode = role()
    decode.on_command(Abort("r", 1), 0.0)
    decode.on_command(start(), 0.0)
    assert decode.active() == []


def test_start_with_ticket_but_no_link_fails_retriably() -> None:
    decode = role()
    decode.on_command(start(ticket=b"t" * 16), 0.0)
    [failed] = failures(decode)
    assert (failed.code, failed.retriable) == ("node_lost", True)


def test_peer_lost_while_receiving_fails_retriably() -> None:
    decode = role()
    decode.on_link(PeerUp(PEER, "test"), 0.0)
    decode.on_command(start(ticket=b"t" * 16), 0.0)
    decode.on_link(PeerLost(PEER, "killed"), 1.0)
    [failed] = failures(decode)
    assert failed.retriable
    assert decode.active() == []


def test_deadline_ends_a_waiting_attempt_for_good() -> None:
    decode = role()
    decode.on_command(start(timeout_s=1.0), 0.0)
    decode.tick(2.0)
    [failed] = failures(decode)
    assert (failed.code, failed.retriable) == ("deadline_exceeded", False)


def test_abort_choice_leaves_the_others_running() -> None:
    engine = FakeEngine()
    pool = BlockPool(64, 4)
    decode = role(engine, pool)
    core = WorkerCore(WorkerKey("w", "0" * 16), "both", engine, pool, [decode], FakeClock(0.0))
    params = SamplingParams(max_tokens=6, n=2, ignore_eos=True, seed=1)
    decode.on_command(start(params=params, choices=[ChoiceState(0), ChoiceState(1)]), 0.0)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for turn in range(20):
        batch, effects = core.begin_step()
        effects += core.end_step(batch, core.compute(batch))
        for effect in effects:
            if isinstance(effect, Tell) and isinstance(effect.message, Output):
                for item in effect.message.items:
                    seen[item.choice] += [t.token_id for t in item.tokens]
        if turn == 1:
            decode.on_command(Abort("r", 1, choice=0), 0.0)
        core.check_invariants()
    assert seen[1] == expected_tokens(PROMPT, params, 1)[0]
    assert len(seen[0]) < 6
    assert pool.num_free_blocks == pool.num_blocks


def test_abort_of_the_only_choice_left_is_no_failure_of_those_that_are_answered() -> None:
    engine, pool = FakeEngine(), BlockPool(64, 4)
    decode = role(engine, pool)
    core = WorkerCore(WorkerKey("w", "0" * 16), "both", engine, pool, [decode], FakeClock(0.0))
    params = SamplingParams(max_tokens=6, n=2, ignore_eos=True, seed=1)
    delivered = [expected_tokens(PROMPT, params, choice)[0][: 4 - choice] for choice in range(2)]
    choices = [ChoiceState(choice, pack_ids(ids)) for choice, ids in enumerate(delivered)]
    decode.on_command(start(params=params, choices=choices), 0.0)
    finished: set[int] = set()
    while not finished:
        batch, effects = core.begin_step()
        effects += core.end_step(batch, core.compute(batch))
        outputs = [e.message for e in effects if isinstance(e, Tell) and isinstance(e.message, Output)]
        finished |= {item.choice for output in outputs for item in output.items if item.finish_reason is not None}
    assert finished == {0}
    decode.on_command(Abort("r", 1, choice=1), 0.0)
    assert failures(decode) == []
    assert decode.active() == []
    core.check_invariants()
    assert pool.num_free_blocks == pool.num_blocks


def test_abort_of_every_choice_before_the_first_token_ends_the_attempt_as_cancelled() -> None:
    decode = role()
    params = SamplingParams(max_tokens=4, n=2)
    decode.on_command(start(params=params, choices=[ChoiceState(0), ChoiceState(1)]), 0.0)
    decode.on_command(Abort("r", 1, choice=0), 0.0)
    assert len(decode.active()) == 1
    decode.on_command(Abort("r", 1, choice=1), 0.0)
    [failed] = failures(decode)
    assert (failed.code, failed.retriable) == ("cancelled", False)
    assert decode.active() == []


def test_local_runner_refuses_what_the_engine_cannot_hold() -> None:
    runner = LocalRunner(FakeEngine(num_blocks=4), FakeClock())
    with pytest.raises(BadRequest, match="holds 16"):
        list(runner.stream(PROMPT, SamplingParams(max_tokens=64)))
