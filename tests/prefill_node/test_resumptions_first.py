"""Prompts of streams that lost their worker go before prompts that have shown nothing yet."""

from __future__ import annotations

from penstock.protocol.messages import Offer, pack_ids

from .test_role import Bench

SECOND, THIRD, FOURTH = (bytes([letter]) * 16 for letter in b"234")
RESUMED = pack_ids([500, 501])


def offers(bench: Bench) -> list[bytes]:
    return [offer.ticket for offer in bench.of(Offer)]


def test_resumption_overtakes_waiting_prompts_and_keeps_its_own_order() -> None:
    bench = Bench(num_blocks=32)
    bench.start("new-0", FOURTH, prompt_ids=pack_ids([7] * 8))
    bench.start("lost-0", SECOND, prompt_ids=pack_ids([8] * 8), output_ids=RESUMED)
    bench.start("lost-1", THIRD, prompt_ids=pack_ids([9] * 8), output_ids=RESUMED)
    for _ in range(8):
        bench.step()
    assert offers(bench) == [SECOND, THIRD, FOURTH]


def test_resumption_overtakes_a_prompt_that_is_half_computed() -> None:
    bench = Bench(num_blocks=32)
    bench.start("new", FOURTH, prompt_ids=pack_ids([7] * 40))
    bench.step()
    assert bench.role.load().queued_tokens == 36
    bench.start("lost", SECOND, prompt_ids=pack_ids([8] * 6), output_ids=RESUMED)
    bench.step()
    bench.step()
    assert bench.role.load().queued_tokens == 36, "two steps of four tokens went to the resumption alone"
    for _ in range(9):
        bench.step()
    assert bench.role.load().queued_tokens == 0


def test_resumption_without_room_holds_the_later_ones_back_too() -> None:
    bench = Bench(num_blocks=4)
    bench.start("new", FOURTH, prompt_ids=pack_ids([7] * 8))
    bench.step()
    bench.start("lost", SECOND, prompt_ids=pack_ids([8] * 10), output_ids=RESUMED)
    bench.start("later", THIRD, prompt_ids=pack_ids([9] * 4))
    for _ in range(4):
        bench.step()
    assert offers(bench) == [FOURTH]
    bench.role.abort_all(bench.clock.now())
    bench.core.check_invariants()
