"""Speculation on the real model in float32: the answers are those without it, from every proposer, in any batch, across
the hand-off, and when a worker dies between two drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from penstock.benchmarks.speculation_prompts import load_prompts
from penstock.decode_node.draft_sources import DraftOptions, openers
from penstock.engine.interface import Engine
from penstock.engine.sequence import Sequence as TokenSequence
from penstock.engine.speculation.build import build_speculation
from penstock.engine.speculation.control import Speculator
from penstock.engine.speculation.draft_model import ModelProposer
from penstock.engine.speculation.interface import Draft, Proposer, Speculation
from penstock.engine.torch_engine import TorchEngine
from penstock.models.shipped_heads import FOLDER
from penstock.models.tokenizer import Tokenizer
from penstock.protocol.messages import WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import InProcessCluster, Result
from penstock.testing.sim_drafts import Know, SeededProposer

from .comparing import assert_equal, requests_of
from .conftest import MakeEngine
from .resuming import KINDS, NUM_TOKENS, ROUTER, Fault, assert_exact, holder, undisturbed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HEAD = FOLDER / "smollm2-135m-instruct.safetensors"
PER_CATEGORY, LONGEST = 10, 112
GREEDY = SamplingParams(max_tokens=18, temperature=0, logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module")
def real_prompts(shared_data: Callable[[str], Path], tokenizer: Tokenizer) -> list[list[int]]:
    """Sixty of Spec-Bench, HumanEval and QMSum, long ones cut."""
    folder = shared_data("spec-bench").parent
    texts = [text for some in load_prompts(folder, PER_CATEGORY).values() for text in some]
    ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    return [prompt[-LONGEST:] for prompt in ids]


def answers(cluster: InProcessCluster, prompts: list[list[int]], at_once: int) -> dict[str, Result]:
    found: dict[str, Result] = {}
    requests = requests_of(prompts, GREEDY)
    for begin in range(0, len(requests), at_once):
        found |= cluster.run(requests[begin : begin + at_once])
    return found


def load_of(cluster: InProcessCluster, name: str) -> WorkerLoad:
    return cluster.workers[name].core.snapshot().load


def speculation(method: str, engine: Engine) -> Speculation | None:
    return build_speculation(method, 6, engine.spec, openers(engine, DraftOptions()))


@pytest.fixture(scope="module")
def plain(real_prompts: list[list[int]], base_engine: object, model_path: Path) -> dict[str, Result]:
    """What a colocated worker answers without drafts."""
    assert isinstance(base_engine, TorchEngine)
    engine = TorchEngine(base_engine.decoder, model_name="smollm2", identity="test", num_blocks=400)
    with InProcessCluster({"both-0": engine}) as cluster:
        found = answers(cluster, real_prompts, 20)
    engine.memory.close()
    return found


@pytest.mark.parametrize(("method", "at_once"), [("suffix", 20), ("ngram", 3), (f"eagle:{HEAD}", 20)])
def test_greedy_answers_to_real_prompts_are_the_same_across_the_hand_off(
    method: str, at_once: int, real_prompts: list[list[int]], plain: dict[str, Result], make_engine: MakeEngine
) -> None:
    assert len(real_prompts) >= 60
    engines = {"prefill-0": make_engine(400), "decode-0": make_engine(400)}
    with InProcessCluster(engines, speculate=partial(speculation, method)) as cluster:
        found = answers(cluster, real_prompts, at_once)
        load = load_of(cluster, "decode-0")
    assert_equal(found, plain)
    assert load.accepted_tokens > 100


def test_a_heads_drafts_behind_a_hand_off_are_those_of_a_colocated_worker(
    real_prompts: list[list[int]], make_engine: MakeEngine
) -> None:
    loads = []
    for names in (("both-0",), ("prefill-0", "decode-0")):
        engines = {name: make_engine(400) for name in names}
        with InProcessCluster(engines, speculate=partial(speculation, f"eagle:{HEAD}")) as cluster:
            answers(cluster, real_prompts[::6], 1)
            loads.append(load_of(cluster, names[-1]))
    colocated, disaggregated = loads
    assert disaggregated.drafted_tokens == colocated.drafted_tokens > 300
    assert disaggregated.accepted_tokens == colocated.accepted_tokens > 50


def test_the_model_as_its_own_draft_is_right_but_for_rounding(
    real_prompts: list[list[int]], plain: dict[str, Result], make_engine: MakeEngine
) -> None:
    some = real_prompts[::6]
    draft = make_engine(400)
    engines = {"both-0": make_engine(400)}
    with InProcessCluster(
        engines, speculate=lambda engine: Speculator([ModelProposer(draft, engine.spec)], 4, None, takes_trees=False)
    ) as cluster:
        found = answers(cluster, some, 10)
        load = load_of(cluster, "both-0")
    for result, index in zip(found.values(), range(0, len(real_prompts), 6), strict=True):
        assert result.answers[0].token_ids == plain[f"r{index}"].answers[0].token_ids
    assert load.accepted_tokens >= 0.98 * load.drafted_tokens > 0


class Oracle:
    """Knows the answer, and is wrong at every third token: drafts are accepted in part wherever a worker dies."""

    name, num_kinds = "oracle", 1

    def __init__(self, result: Result) -> None:
        self._answers = [answer.token_ids for answer in result.answers]

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.0

    def first_guess(self, kind: int) -> float:
        return 0.7

    def propose(self, seqs: Sequence[TokenSequence], limits: Sequence[int]) -> list[Draft]:
        return [self._propose(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _propose(self, seq: TokenSequence, limit: int) -> Draft:
        begin = len(seq.output_ids)
        right = self._answers[seq.choice][begin : begin + limit]
        token_ids = tuple(token + int((begin + n) % 3 == 2) for n, token in enumerate(right))
        return Draft(token_ids, (0,) * len(token_ids))

    def forget(self, seq: TokenSequence) -> None:
        pass


def around(found: dict[str, Result], prompts: list[list[int]]) -> Know:
    """Knows what each prompt is answered with."""
    ids = {tuple(prompt): found[f"r{index}"].answers[0].token_ids for index, prompt in enumerate(prompts)}
    return lambda seq, count: ids[tuple(seq.prompt_ids)][len(seq.output_ids) :][:count]


@pytest.mark.parametrize("at_once", [1, 20])
def test_greedy_answers_with_trees_are_the_same_across_the_hand_off(
    at_once: int, real_prompts: list[list[int]], plain: dict[str, Result], make_engine: MakeEngine
) -> None:
    """Trees grown around the right answer, whose branches are taken and left at any token."""
    prompts = real_prompts if at_once > 1 else real_prompts[:15]
    know = around(plain, real_prompts)
    engines = {"prefill-0": make_engine(400), "decode-0": make_engine(400)}
    with InProcessCluster(
        engines, speculate=lambda _: Speculator([SeededProposer(0.85, 1, 1.0, know)], 8, None)
    ) as cluster:
        found = answers(cluster, prompts, at_once)
        load = load_of(cluster, "decode-0")
    assert_equal(found, {name: plain[name] for name in found})
    assert load.drafted_tokens > load.accepted_tokens > 5 * len(prompts)


@pytest.mark.parametrize("kind", list(KINDS))
def test_answers_with_trees_are_the_same_in_the_native_step(
    kind: str, model_path: Path, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    """Bit for bit, with a bfloat16 cache: ids and log-probabilities."""
    engine = TorchEngine.load(model_path, model_name="smollm2", num_blocks=64)
    request = request_of(msgspec.structs.replace(KINDS[kind], max_tokens=40))
    with InProcessCluster({"both-0": engine}) as cluster:
        expected = cluster.run([request])

    def know(seq: TokenSequence, count: int) -> list[int]:
        return expected["r"].answers[seq.choice].token_ids[len(seq.output_ids) :][:count]

    with InProcessCluster(
        {"both-0": engine}, speculate=lambda _: Speculator([SeededProposer(0.85, 1, 1.0, know)], 12, None)
    ) as cluster:
        found = cluster.run([request])
        load = load_of(cluster, "both-0")
    engine.memory.close()
    assert_exact(found, expected)
    assert load.accepted_tokens > 5


@pytest.mark.parametrize(("index", "shape"), [(1, "chain"), (4, "chain"), (3, "tree")])
@pytest.mark.parametrize("kind", list(KINDS))
def test_decode_worker_killed_between_drafts_changes_nothing_in_the_answer(
    kind: str, index: int, shape: str, make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS[kind])
    expected = undisturbed(make_engine, request)
    ids = [answer.token_ids for answer in expected["r"].answers]

    def propose() -> Proposer:
        if shape == "chain":
            return Oracle(expected["r"])
        return SeededProposer(0.7, 3, 1.0, lambda seq, count: ids[seq.choice][len(seq.output_ids) :][:count])

    loads: list[WorkerLoad] = []

    def kill(cluster: InProcessCluster) -> None:
        name = holder(cluster, "decode")
        loads.append(load_of(cluster, name))
        cluster.kill(name)

    fault = Fault(index, kill)
    engines = {name: make_engine(64) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")}
    with InProcessCluster(engines, router=ROUTER, speculate=lambda engine: Speculator([propose()], 6, None)) as cluster:
        found = cluster.run([request], each_turn=fault)
        loads += [load_of(cluster, name) for name in cluster.workers if name.startswith("decode")]
    assert fault.happened_at is not None
    assert fault.happened_at < NUM_TOKENS * request.params.n
    assert_exact(found, expected)
    assert found["r"].resumed == 1
    drafted, accepted = (sum(getattr(load, name) for load in loads) for name in ("drafted_tokens", "accepted_tokens"))
    assert drafted > accepted > 0
