"""Is disaggregated output equal to colocated output? One case for each feature, on a real model in float32.

Each case runs the same requests twice: on one worker that does both phases, and on separate workers with the feature
in play, over real links. Tokens, finish reasons and logprobs are compared; a case that converts the cache on the way to
8 bits says how far its answer may differ, all others not at all. Sums of batches of different shape differ in their
last bits, so logprobs count as equal within LOGPROB_TOLERANCE.

    python -m penstock.testing.parity              run all and print the table
    python -m penstock.testing.parity --write      the same, into docs/PARITY.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..engine.interface import Engine
from ..gateway.choice import Choice
from ..gateway.requests import AnswerOptions
from ..gateway.tokens import GatewayTokenizer
from ..kvtransfer.mesh import MeshSettings
from ..models.tokenizer import Tokenizer
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.interface import GenerateRequest, TokensEvent
from .inprocess import PATIENCE_S, InProcessCluster, Result

LOGPROB_TOLERANCE = 1e-3
SEPARATE_PROCESSES = ("nixl", "ucx", "owner")  # not in one process without more ado; other tests run them
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a message.",
    "List five uses of a paper clip.",
)
TIGHT_BLOCKS = 13  # fewer than the sequences that enter need with their answers
MakeEngine = Callable[[int, int], Engine]  # blocks, block size
Prompts = list[list[int]]
Check = Callable[[InProcessCluster], bool]

GREEDY = SamplingParams(max_tokens=10, temperature=0, logprobs=2, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """One feature. `happened` looks at the cluster afterwards: a feature that was not in play proves nothing.

    `least_equal` and `most_apart`: the share of equal tokens and the difference of logprobs of equal tokens that the
    case allows.
    """

    feature: str
    params: SamplingParams = GREEDY
    transport: str = "shm"
    max_batch_tokens: int = 512
    decode_blocks: int = 96
    prefill_block_size: int = 16
    park_bytes: int = 0
    wire_dtype: str = "lossless"
    num_decode: int = 1
    stop: tuple[str, ...] = ()
    warms_up: bool = False  # the first prompt is served once before
    kills: str = ""  # the role of which a worker dies in the middle
    happened: Check = field(default=lambda cluster: True)
    least_equal: float = 1.0
    most_apart: float = LOGPROB_TOLERANCE


@dataclass(frozen=True)
class Verdict:
    """What came out. `apart`: the largest difference of the logprobs of equal tokens."""

    case: Case
    num_tokens: int
    num_equal: int
    apart: float
    happened: bool

    @property
    def is_ok(self) -> bool:
        return self.happened and self.num_equal >= self.case.least_equal * self.num_tokens and self.is_close

    @property
    def is_close(self) -> bool:
        return self.apart <= self.case.most_apart


def _load(cluster: InProcessCluster, name: str, figure: str) -> int:
    return sum(
        getattr(worker.core.snapshot().load, figure) for key, worker in cluster.workers.items() if key.startswith(name)
    )


def cases(transports: tuple[str, ...] = ()) -> list[Case]:
    """All features over shared memory, then plain greedy over each of `transports`."""
    seeded = msgspec.structs.replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
    penalised = msgspec.structs.replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2)
    found = [
        Case("greedy"),
        Case("seeded sampling", seeded),
        Case("n = 3", msgspec.structs.replace(seeded, temperature=1.0, n=3, seed=8)),
        Case("top-5 logprobs", msgspec.structs.replace(GREEDY, logprobs=5)),
        Case("penalties", penalised),
        Case("min_tokens and stop tokens", msgspec.structs.replace(GREEDY, min_tokens=4, ignore_eos=False)),
        Case("stop strings", msgspec.structs.replace(GREEDY, max_tokens=14), stop=(" the", " of")),
        Case("chunked prefill", max_batch_tokens=11),
        Case(
            "prefix hit on both sides",
            warms_up=True,
            happened=lambda c: (
                _load(c, "decode", "prefix_hit_tokens") > 0 and _load(c, "prefill", "prefix_hit_tokens") > 0
            ),
        ),
        Case(
            "preempted, computed again",
            msgspec.structs.replace(GREEDY, max_tokens=40),
            decode_blocks=TIGHT_BLOCKS,
            happened=lambda c: _load(c, "decode", "preemptions") > 0,
        ),
        Case(
            "preempted, parked in host memory",
            msgspec.structs.replace(seeded, max_tokens=40),
            decode_blocks=TIGHT_BLOCKS,
            park_bytes=256 << 20,
            happened=lambda c: _load(c, "decode", "parked") > 0,
        ),
        Case("resumed, decode worker lost", seeded, num_decode=2, kills="decode", happened=_has_resumed),
        Case(
            "retried, prefill worker lost",
            num_decode=1,
            kills="prefill",
            happened=lambda c: c.router.counters.retries > 0,
        ),
        Case("block size 8 at prefill, 16 at decode", prefill_block_size=8),
        Case("block size 32 at prefill, 16 at decode", seeded, prefill_block_size=32, warms_up=True),
        Case("wire bfloat16", wire_dtype="bfloat16", least_equal=0.9, most_apart=0.1),
        Case("wire FP8-E4M3", wire_dtype="fp8_e4m3", least_equal=0.7, most_apart=0.5),
        Case("wire INT8", wire_dtype="int8", least_equal=0.7, most_apart=0.5),
    ]
    return found + [Case(f"transport {name}", transport=name) for name in transports]


def _has_resumed(cluster: InProcessCluster) -> bool:
    return cluster.router.counters.resumed > 0


class Matrix:
    """Runs cases; the colocated half of each distinct set of requests is run once."""

    def __init__(self, make_engine: MakeEngine, prompts: Prompts, tokenizer: GatewayTokenizer, folder: Path) -> None:
        self._make, self._prompts, self._tokenizer, self._folder = make_engine, prompts, tokenizer, folder
        self._expected: dict[bytes, dict[str, Result]] = {}

    def run(self, case: Case) -> Verdict:
        requests = [GenerateRequest(f"r{i}", prompt, case.params, 600.0) for i, prompt in enumerate(self._prompts)]
        expected = self._colocated(case, requests)
        found, happened = self._disaggregated(case, requests)
        return self._compare(case, found, expected, happened)

    def _colocated(self, case: Case, requests: list[GenerateRequest]) -> dict[str, Result]:
        key = msgspec.msgpack.encode(case.params)
        if key not in self._expected:
            with InProcessCluster({"both-0": self._make(128, 16)}) as cluster:
                self._expected[key] = cluster.run(requests)
        return self._expected[key]

    def _disaggregated(self, case: Case, requests: list[GenerateRequest]) -> tuple[dict[str, Result], bool]:
        router = RouterConfig(
            policy="prefix-affinity", worker_timeout_s=PATIENCE_S, unacknowledged_s=PATIENCE_S, unavailable_s=PATIENCE_S
        )
        num_prefill = 2 if case.kills == "prefill" else 1
        engines: dict[str, Engine] = {
            f"prefill-{i}": self._make(2048 // case.prefill_block_size, case.prefill_block_size)
            for i in range(num_prefill)
        }
        engines |= {f"decode-{i}": self._make(case.decode_blocks, 16) for i in range(case.num_decode)}
        with InProcessCluster(
            engines,
            transport=case.transport,
            runtime_dir=self._folder,
            max_batch_tokens=case.max_batch_tokens,
            router=router,
            park_bytes=case.park_bytes,
            settings=MeshSettings((case.transport,), case.wire_dtype),
        ) as cluster:
            if case.warms_up:
                cluster.run([replace_id(requests[0], "warm-up")])
            found = cluster.run(requests, each_turn=_killer(case.kills), timeout_s=300.0)
            return found, cluster.router.counters.remote_prefills > 0 and case.happened(cluster)

    def _compare(self, case: Case, found: dict[str, Result], expected: dict[str, Result], happened: bool) -> Verdict:
        num_tokens = num_equal = 0
        apart = 0.0
        for name, result in expected.items():
            for ours, theirs in zip(found[name].answers, result.answers, strict=True):
                num_tokens += len(theirs.tokens)
                is_same = self._shown(case, ours) == self._shown(case, theirs)
                for a, b in zip(ours.tokens, theirs.tokens, strict=False):
                    if a.token_id != b.token_id:
                        break  # what follows answers another question
                    num_equal += is_same or case.least_equal < 1
                    if a.logprob is not None and b.logprob is not None:
                        apart = max(apart, abs(a.logprob.logprob - b.logprob.logprob))
        return Verdict(case, num_tokens, num_equal, apart, happened and not any(r.error for r in found.values()))

    def _shown(self, case: Case, answer: object) -> tuple[str | None, str]:
        """Finish reason and text as the gateway would give them, stop strings applied."""
        tokens, reason = answer.tokens, answer.finish_reason  # type: ignore[attr-defined]  # an Answer
        choice = Choice(0, self._tokenizer, case.params, AnswerOptions("m", stop=case.stop))
        text = ""
        for at, token in enumerate(tokens):
            is_last = at == len(tokens) - 1
            delta = choice.take(TokensEvent(0, at, (token,), reason if is_last else None))
            text += delta.text if delta is not None else ""
        return choice.finish_reason, text


def replace_id(request: GenerateRequest, request_id: str) -> GenerateRequest:
    return msgspec.structs.replace(request, request_id=request_id)


def _killer(role: str) -> Callable[[InProcessCluster], None] | None:
    """Kills the busiest worker of `role` once: decode when tokens have come, prefill before the first."""
    if not role:
        return None
    done: list[str] = []

    def kill(cluster: InProcessCluster) -> None:
        num_tokens = sum(result.num_tokens for result in cluster.results.values())
        busy = [w for w in cluster.router.status().workers if w.worker_id.startswith(role) and w.num_attempts]
        if done or not busy or (role == "decode" and num_tokens < 5):
            return
        victim = max(busy, key=lambda worker: worker.num_attempts).worker_id
        done.append(victim)
        cluster.kill(victim)

    return kill


# ---- the table ----


def table(verdicts: list[Verdict]) -> str:
    """Markdown: one row for each case."""
    rows = ["| Feature | Tokens equal | Logprobs apart, at most | Allowed | |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        case = verdict.case
        exact = case.least_equal == 1
        allowed = "equal" if exact else f"{case.least_equal:.0%} of tokens, {case.most_apart:g}"
        equal = f"{verdict.num_equal} of {verdict.num_tokens}"
        apart = f"< {LOGPROB_TOLERANCE:g}" if verdict.apart < LOGPROB_TOLERANCE else f"{verdict.apart:.2g}"
        rows.append(f"| {case.feature} | {equal} | {apart} | {allowed} | {'ok' if verdict.is_ok else '**differs**'} |")
    return "\n".join(rows)


HEAD = """# Parity: disaggregated against colocated

What `python -m penstock.testing.parity --write` found with SmolLM2-135M-Instruct in float32: the same requests on one
worker that does both phases, and on separate workers with the feature in play, over real links (shared memory unless
the row names another transport). Tokens and finish reasons are compared, stop strings applied, and the logprobs of
equal tokens. Rows in which the cache itself is converted to fewer bits say how far the answer may differ; a row counts
only if its feature was really in play. `tests/e2e/test_parity_matrix.py` runs the same cases.

"""


def conversations(encode: Callable[[list[dict[str, str]]], list[int]]) -> Prompts:
    """The prompts of the matrix: four, of which one begins like another."""
    prompts = [encode([{"role": "user", "content": text}]) for text in PROMPTS]
    return [*prompts, prompts[0] + prompts[1]]


def usable_transports() -> tuple[str, ...]:
    """Every transport that can be used between two workers of this process."""
    from ..kvtransfer.transports.catalog import ALL, available

    return tuple(name for name in ALL if name not in SEPARATE_PROCESSES and available(name) is None)


def main(argv: list[str] | None = None) -> int:
    """0 when every case holds."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.parity", description=description)
    parser.add_argument("--write", action="store_true", help="write the table to docs/PARITY.md")
    args = parser.parse_args(argv)
    from ..models import store

    path = store.resolve(store.DEFAULT_MODEL).path
    verdicts: list[Verdict] = []
    with real_model(path) as (make_engine, tokenizer), tempfile.TemporaryDirectory(prefix="kv-") as folder:
        matrix = Matrix(make_engine, conversations(tokenizer.encode_chat), tokenizer, Path(folder))
        for case in cases(usable_transports()):
            verdicts.append(matrix.run(case))
            sys.stderr.write(f"{case.feature}: {'ok' if verdicts[-1].is_ok else 'differs'}\n")
    if args.write:
        document = Path(__file__).parent.parent / "docs" / "PARITY.md"
        document.write_text(HEAD + table(verdicts) + "\n", encoding="utf-8")
    sys.stdout.write(table(verdicts) + "\n")
    return int(not all(verdict.is_ok for verdict in verdicts))


@contextmanager
def real_model(model: Path) -> Iterator[tuple[MakeEngine, Tokenizer]]:
    """Float32 engines that share one set of weights, and the tokenizer, of the model at `model`."""
    from ..engine.torch_engine import TorchEngine
    from ..models.tokenizer import load_tokenizer

    base = TorchEngine.load(model, model_name="parity", dtype="float32", num_blocks=2, max_model_len=2048)
    made: list[TorchEngine] = [base]

    def make(num_blocks: int, block_size: int) -> Engine:
        engine = TorchEngine(
            base.decoder, model_name="parity", identity="parity", num_blocks=num_blocks, block_size=block_size
        )
        made.append(engine)
        return engine

    try:
        yield make, load_tokenizer(model)
    finally:
        for engine in made:
            engine.memory.close()


if __name__ == "__main__":
    raise SystemExit(main())
