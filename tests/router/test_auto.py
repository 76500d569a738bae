"""The decision of `auto`, by hand: costs are set, so every expected choice can be computed on paper."""

from __future__ import annotations

import time

import pytest

from penstock.core.ids import AttemptKey, WorkerKey
from penstock.protocol.messages import Fingerprint, Hello, Output, Phases, SampledToken, Tokens
from penstock.protocol.sampling import SamplingParams
from penstock.router.auto import Auto, Targets
from penstock.router.cost_model import CostModel
from penstock.router.interface import GenerateRequest
from penstock.router.options import Choice, Options
from penstock.router.registry import WorkerRecord
from penstock.router.requests import RequestRecord

SIZE = 16


class Costs(CostModel):
    """0.1 ms a prompt token, 1 ms a hand-off, 10 ms an output token whatever the batch; answers of 100 tokens."""

    def __init__(self, *, transfer_s: float = 0.001, stall: float = 1.0, neighbour_stall: float = 0.0) -> None:
        super().__init__()
        self._prefill.coefficients = [0.0, 1e-4, 0.0, 0.0, 0.0]
        self._transfer.coefficients = [transfer_s, 0.0]
        self._token.coefficients = [0.01, 0.0, 0.0, stall, neighbour_stall]
        self.expected_output_tokens = 100.0


def worker(name: str, role: str, *, waiting_s: float = 0.0, streams: int = 0, links: tuple[WorkerRecord, ...] = ()):
    fingerprint = Fingerprint("m", "w", "float32", 1, 1, 1, SIZE, "l")
    record = WorkerRecord(WorkerKey(name, "0" * 16), Hello(role, 1, fingerprint, 10_000, 1 << 20, 64, "", []), 0.0)  # type: ignore[arg-type]
    record.num_streams = record.num_running = streams
    record.linked = {other.key: "shm" for other in links}
    if waiting_s:
        record.prompts.add(AttemptKey("other", 1), waiting_s, now=0.0)
    return record


def decide(
    decodes: list[WorkerRecord],
    prefills: list[WorkerRecord],
    *,
    tokens: int = 10_000,
    here: dict[WorkerRecord, int] | None = None,
    model: CostModel | None = None,
    may_stay: bool = True,
    must_stay: bool = False,
) -> tuple[str, str | None]:
    request = GenerateRequest("r", [1] * 8, SamplingParams(max_tokens=1000), 60.0)
    held = {record.key: count for record, count in (here or {}).items()}
    options = Options(
        record=RequestRecord(request, 1, b"", 0.0, 60.0),
        now=0.0,
        num_tokens=tokens,
        decodes=decodes,
        prefills=[] if must_stay else prefills,
        prefills_of=lambda decode: [p for p in prefills if p.key in decode.linked],
        held_tokens=held,
        here_tokens=held,
        may_stay=may_stay,
        must_stay=must_stay,
    )
    choice: Choice = Auto(model or Costs(), Targets(10.0, 0.1)).choose(options)
    return choice.decode.key.worker_id, choice.prefill.key.worker_id if choice.prefill else None


def test_idle_cluster_prefills_where_it_decodes():
    prefill = worker("p", "prefill")
    assert decide([worker("d", "decode", links=(prefill,))], [prefill]) == ("d", None)


def test_prompt_leaves_a_worker_whose_streams_it_would_hold_up():
    prefill = worker("p", "prefill")  # 1 s of prefill: 1 s for each of 4 streams, against 1 ms of transfer
    assert decide([worker("d", "decode", streams=4, links=(prefill,))], [prefill]) == ("d", "p")


def test_short_prompt_stays_among_streams_when_the_hand_off_costs_more():
    prefill = worker("p", "prefill")
    busy = worker("d", "decode", streams=4, links=(prefill,))
    assert decide([busy], [prefill], tokens=100, model=Costs(transfer_s=0.2)) == ("d", None)
    assert decide([busy], [prefill], tokens=10_000, model=Costs(transfer_s=0.2)) == ("d", "p")


@pytest.mark.parametrize(("waiting_s", "expected"), [(0.0, "p"), (0.9, "p"), (40.0, None)])
def test_full_prefill_queue_sends_a_prompt_to_decode(waiting_s: float, expected: str | None):
    prefill = worker("p", "prefill", waiting_s=waiting_s)
    assert decide([worker("d", "decode", streams=1, links=(prefill,))], [prefill])[1] == expected


def test_prefix_is_worth_a_wait_that_is_shorter_than_computing_it():
    empty, holder = worker("p0", "prefill"), worker("p1", "prefill", waiting_s=0.5)
    decode = worker("d", "decode", streams=4, links=(empty, holder))
    # 1 s on the empty one; 0.5 s of waiting and 0.4 s there, or 0.6 s.
    assert decide([decode], [empty, holder], here={holder: 6000})[1] == "p1"
    assert decide([decode], [empty, holder], here={holder: 4000})[1] == "p0"


def test_only_linked_workers_make_a_pair():
    first, second = worker("p0", "prefill"), worker("p1", "prefill", waiting_s=1.0)
    assert decide([worker("d", "decode", streams=4, links=(second,))], [first, second]) == ("d", "p1")


def test_new_stream_avoids_a_worker_that_still_computes_prompts_for_itself():
    prefill = worker("p", "prefill")
    digging = worker("d0", "decode", waiting_s=9.0, links=(prefill,))
    streaming = worker("d1", "decode", streams=8, links=(prefill,))
    assert decide([digging, streaming], [prefill]) == ("d1", "p")


def test_orders_are_kept_whatever_they_cost():
    prefill = worker("p", "prefill", waiting_s=100.0)
    idle = worker("d", "decode", links=(prefill,))
    assert decide([idle], [prefill], may_stay=False) == ("d", "p")
    assert decide([worker("d", "decode", streams=9, links=(prefill,))], [prefill], must_stay=True) == ("d", None)


def test_prompt_stays_where_handing_it_over_holds_up_the_same_streams_and_more(make_neighbours) -> None:
    """1 s of prefill anywhere stops 4 streams by 0.5 s a second; the hand-off costs 1 ms more."""
    decode, prefill = make_neighbours(streams=4)
    model = Costs(stall=0.5, neighbour_stall=0.6)
    assert decide([decode], [prefill], model=model) == ("d", None)
    decode.neighbours = ()
    assert decide([decode], [prefill], model=model) == ("d", "p")


def test_neighbour_at_work_makes_a_prompt_dearer(make_neighbours) -> None:
    decode, prefill = make_neighbours(streams=4)
    model = Costs(stall=0.0)
    model._transfer.coefficients = [0.0, 0.0]
    model._prefill.coefficients = [0.0, 1e-4, 0.0, 0.0, 1e-4]
    assert decide([decode], [prefill], model=model) == ("d", None)  # where decode streams, a neighbour is slowed down


@pytest.fixture
def make_neighbours():
    def make(*, streams: int) -> tuple[WorkerRecord, WorkerRecord]:
        prefill = worker("p", "prefill")
        decode = worker("d", "decode", streams=streams, links=(prefill,))
        decode.neighbours = (prefill.key,)
        return decode, prefill

    return make


def test_colocated_workers_share_prompts_by_cost_alone():
    first, second = worker("b0", "both", waiting_s=0.3), worker("b1", "both")
    assert decide([first, second], [], here={first: 8000}) == ("b0", None)
    assert decide([first, second], [], here={first: 1600}) == ("b1", None)


def test_decision_of_a_request_is_told_with_its_first_tokens(make_rig):
    rig = make_rig(policy="auto")
    rig.pair()
    rig.submit(prompt=40)
    holder, start = rig.start()
    assert start.ticket is None  # alone on an idle cluster
    tokens = (SampledToken(rig.token_at(0, 0)),)
    rig.clock.advance(0.5)
    rig.say(holder, Output([Tokens("r", start.attempt, 0, 0, tokens, phases=Phases(0.0, 0.5, 0.0, 8))]))
    decision = rig.events["r"][0].decision
    assert (decision.policy, decision.decode, decision.prefill) == ("auto", "d0", None)
    assert decision.ttft_s > 0
    report = decision.report()
    assert report["predicted_ttft_ms"] == round(decision.ttft_s * 1e3, 3)
    assert report["prefill"] == "d0"


def test_busy_decode_worker_gets_its_next_prompts_from_prefill(make_rig):
    rig = make_rig(policy="auto")
    rig.join("p0", "prefill")
    rig.join("d0", blocks=10_000, longest=100_000)
    for i in range(12):
        rig.submit(f"r{i}", prompt=300, max_tokens=64)
        rig.out(1, request_id=f"r{i}")
    rig.submit("late", prompt=900, max_tokens=64)
    assert rig.start("late")[1].ticket is not None


def test_blocks_on_their_way_do_not_count_for_a_prompt_that_decode_would_compute_now(make_rig):
    rig = make_rig(policy="auto", disaggregate="always")
    rig.pair()
    rig.submit("a", prompt=80)
    placer = rig.core._life.placer
    hashes = rig.core._life.table.active["a"].hashes
    decode = rig.start("a")[0]
    matches = placer.index.matches(hashes)
    assert matches.expected[decode] == len(hashes)
    assert decode not in matches.here
    rig.out(1, request_id="a")
    assert placer.index.matches(hashes).here[decode] == len(hashes)


def test_decisions_among_many_workers_are_not_dear():
    """Against the plain work that any policy has to do on the same machine: looking once at every worker."""
    prefills = [worker(f"p{i:02d}", "prefill", waiting_s=i / 10 + 0.1) for i in range(32)]
    decodes = [worker(f"d{i:02d}", "decode", streams=i, links=tuple(prefills)) for i in range(32)]

    def fastest(act) -> float:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(20):
                act()
            times.append(time.perf_counter() - begun)
        return min(times)

    look = fastest(lambda: sorted((len(w.attempts), w.key) for w in (*prefills, *decodes)))
    assert fastest(lambda: decide(decodes, prefills, model=CostModel())) < 100 * look
