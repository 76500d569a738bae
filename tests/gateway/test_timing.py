"""A whole cluster on a clock that only its engines move: every part of every request is what really passed."""

from __future__ import annotations

import pytest

from penstock.engine.interface import OnLayers, ScheduledSeq
from penstock.gateway.explain.parts import ITL_PARTS, TTFT_PARTS
from penstock.gateway.timing import RequestTiming
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest, TokensEvent
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine
from penstock.testing.inprocess import InProcessCluster

TOKEN_S = 0.001


class TimedEngine(FakeEngine):
    """A token takes a millisecond of the clock, a step one more."""

    def __init__(self, clock: FakeClock, num_blocks: int = 64) -> None:
        super().__init__(num_blocks=num_blocks)
        self._clock = clock
        self.steps: list[list[tuple[str, int]]] = []

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        self.steps.append([(entry.seq.key.request_id, entry.num_new_tokens) for entry in batch])
        self._clock.advance(TOKEN_S * (1 + sum(entry.num_new_tokens for entry in batch)))
        return super().execute(batch, on_layers)


def run(
    clock: FakeClock, engines: dict[str, TimedEngine], lengths: list[int], max_tokens: int = 5
) -> dict[str, RequestTiming]:
    config = RouterConfig(worker_timeout_s=1e6, unacknowledged_s=1e6)
    timings: dict[str, RequestTiming] = {}

    def on_tokens(request_id: str, event: TokensEvent) -> None:
        timings[request_id].mark_tokens(event)

    with InProcessCluster(engines, max_batch_tokens=8, router=config, clock=clock) as cluster:
        requests = [
            GenerateRequest(
                f"r{i}", list(range(1 + i, 1 + i + length)), SamplingParams(max_tokens=max_tokens, ignore_eos=True), 1e5
            )
            for i, length in enumerate(lengths)
        ]
        for request in requests:
            timings[request.request_id] = RequestTiming(clock, clock.now())
            timings[request.request_id].mark_submitted()
        cluster.run(requests, on_tokens=on_tokens)
    return timings


def parts(timing: RequestTiming) -> dict[str, float]:
    return {name: part / 1e3 for name, part in zip(TTFT_PARTS, timing.ttft_us(), strict=True) if part}


def check_sums(timing: RequestTiming) -> None:
    assert timing.ttft_s is not None
    assert sum(timing.ttft_us()) == round(timing.ttft_s * 1e6)
    assert dict(zip(TTFT_PARTS, timing.ttft_us(), strict=True))["other"] == 0
    assert sum(timing.itl_us) == pytest.approx(round(timing.residence_s * 1e6), abs=5)


def test_parts_of_one_handed_over_request_are_the_steps_it_took() -> None:
    clock = FakeClock()
    timings = run(clock, {"prefill-0": TimedEngine(clock), "decode-0": TimedEngine(clock)}, [20])
    check_sums(timings["r0"])
    assert parts(timings["r0"]) == {"prefill_compute": 18.0, "first_step": 5.0}  # 8 + 8, then 4 and the token


def test_prompt_behind_others_waits_in_the_prefill_queue() -> None:
    clock = FakeClock()
    timings = run(clock, {"prefill-0": TimedEngine(clock), "decode-0": TimedEngine(clock)}, [16, 16, 16])
    for timing in timings.values():
        check_sums(timing)
    queues = [parts(timing).get("prefill_queue", 0.0) for timing in timings.values()]
    assert queues[0] == 0.0
    assert queues[0] < queues[1] < queues[2]
    assert all(parts(t)["prefill_compute"] + parts(t)["first_step"] == 18.0 for t in timings.values())
    works = [timing.phases.work_s for timing in timings.values()]
    assert works == pytest.approx([0.018] * 3)


def test_local_prefill_has_no_transfer_and_its_prompts_slow_the_streams_beside_it() -> None:
    clock = FakeClock()
    timings = run(clock, {"both-0": TimedEngine(clock)}, [4, 24], max_tokens=12)
    for timing in timings.values():
        check_sums(timing)
        assert "transfer" not in parts(timing)
        assert timing.routing is not None
        assert (timing.routing.decode, timing.routing.prefill) == ("both-0", None)
    assert dict(zip(ITL_PARTS, timings["r0"].itl_us, strict=True))["prompts"] > 0
    assert dict(zip(ITL_PARTS, timings["r1"].itl_us, strict=True))["prompts"] == 0


def test_decode_worker_without_room_shows_as_waiting_in_the_router() -> None:
    clock = FakeClock()
    engines = {"prefill-0": TimedEngine(clock), "decode-0": TimedEngine(clock, num_blocks=8)}
    timings = run(clock, engines, [20, 20, 20], max_tokens=8)
    for timing in timings.values():
        check_sums(timing)
    queues = [parts(timing).get("queue", 0.0) for timing in timings.values()]
    assert queues[0] == 0.0
    assert 0.0 < queues[1] < queues[2]


def test_shared_steps_are_shared_work() -> None:
    clock = FakeClock()
    timings = run(clock, {"prefill-0": TimedEngine(clock), "decode-0": TimedEngine(clock)}, [4, 4])
    assert [timing.phases.work_s for timing in timings.values()] == pytest.approx([0.0045, 0.0045])
    assert [parts(timing)["first_step"] for timing in timings.values()] == [9.0, 9.0]


def test_first_write_counts_once_and_in_the_whole() -> None:
    clock = FakeClock()
    timing = RequestTiming(clock, clock.now())
    clock.advance(0.001)
    timing.mark_submitted()
    clock.advance(0.010)
    timing.mark_tokens(TokensEvent(0, 0, (SampledToken(1),)))
    clock.advance(0.002)
    timing.mark_written()
    clock.advance(1.0)
    timing.mark_written()
    assert parts(timing) == {"gateway": 1.0, "other": 10.0, "write": 2.0}
    report = timing.report()
    assert (report["ttft_ms"], report["first_piece_ms"]) == (11.0, 13.0)


def test_gaps_of_two_choices_are_not_mixed() -> None:
    clock = FakeClock()
    timing = RequestTiming(clock, clock.now())
    for choice, index in ((0, 0), (1, 0), (0, 1), (1, 1)):
        clock.advance(0.010)
        gap = timing.mark_tokens(TokensEvent(choice, index, (SampledToken(1),)))
        assert (gap.parts_us is None) == (index == 0)
    assert sum(timing.itl_us) == 40_000


def test_request_without_a_token_has_no_parts() -> None:
    clock = FakeClock()
    timing = RequestTiming(clock, clock.now())
    assert sum(timing.ttft_us()) == 0
    assert timing.report()["first_piece_ms"] == 0
