"""What speculation brings: tokens per step and speed-up by category, against the same engine without.

    python benchmarks/speculation.py --data FOLDER --json FILE            batch 1, greedy
    python benchmarks/speculation.py --data FOLDER --batch 32 --json FILE

FOLDER: see `speculation_prompts`. All methods answer each group of prompts one after the other before the next group
comes, "off" twice: the second time shows what differences mean nothing. Every answer must be the one without drafts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from penstock.benchmarks.speculation_prompts import load_prompts
from penstock.core.clock import MonotonicClock
from penstock.core.ids import WorkerKey
from penstock.decode_node.local import items_of
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.engine.saturation import STEPS
from penstock.engine.speculation.build import Openers, build_speculation
from penstock.engine.speculation.draft_head import HeadProposer
from penstock.engine.speculation.open_head import open_head, open_shipped_head
from penstock.engine.torch_engine import Observe, TorchEngine
from penstock.kvtransfer.destination import DestinationTable
from penstock.models.store import resolve
from penstock.models.tokenizer import Tokenizer, load_tokenizer
from penstock.protocol.messages import ChoiceState, FromRouter, StartDecode, pack_ids
from penstock.protocol.sampling import SamplingParams
from penstock.worker.core import CoreEffect, WorkerCore

EPOCH, AGAIN = "0" * 16, "off again"


@dataclass(slots=True)
class Figures:
    """Of one method in one category. steps: of a sequence, its first token's apart."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: list[float] = field(default_factory=list)  # of each group


class Shown(NamedTuple):
    """What `TorchEngine.show_steps` takes."""

    taps: tuple[int, ...]
    observe: Observe | None


class Method:
    """A decode worker of its own, with its own drafts and prefix cache, on the engine that all methods share."""

    def __init__(self, name: str, engine: TorchEngine, max_tokens: int) -> None:
        spec, key = engine.spec, WorkerKey("bench", EPOCH)
        self.pool = BlockPool(spec.num_blocks, spec.block_size, enable_prefix_cache=False)
        self._engine, self._shown = engine, Shown((), None)
        openers, method = Openers(head=self._open_head), "off" if name == AGAIN else name
        speculation = build_speculation(method, max_tokens, spec, openers, MonotonicClock())
        role = DecodeRole(key, spec, self.pool, DestinationTable(60.0), b"", speculation=speculation)
        self.core = WorkerCore(key, "both", engine, self.pool, [role], MonotonicClock(), max_batch_tokens=2048)
        self._number = 0

    def answer(self, prompts: list[list[int]], params: SamplingParams, figures: Figures) -> list[list[int]]:
        """All prompts at once; the time counts from when each has its first token."""
        self._engine.show_steps(*self._shown)
        answers: dict[str, list[int]] = {}
        for ids in prompts:
            self._number += 1
            answers[f"bench-{self._number}"] = []
            command = StartDecode(f"bench-{self._number}", 0, pack_ids(ids), params, [ChoiceState(0)], 1e6)
            self._count(self.core.on_frame(FromRouter(EPOCH, self._number, command)), answers, None)
        started: float | None = None
        while self.core.has_work():
            if started is None and all(answers.values()):
                started = time.perf_counter()
                figures.tokens -= sum(map(len, answers.values()))
            batch, effects = self.core.begin_step()
            effects += self.core.end_step(batch, self.core.compute(batch))
            self._count(effects, answers, figures if started is not None else None)
        if started is not None:  # else one of them was empty
            figures.seconds.append(time.perf_counter() - started)
            figures.tokens += sum(map(len, answers.values()))
        return list(answers.values())

    def _open_head(self, source: str | None) -> HeadProposer | None:
        """A head sees only the steps of its own method."""
        head = open_shipped_head(self._engine) if source is None else open_head(self._engine, Path(source))
        if head is not None:
            self._shown = Shown(head.taps, head.observe)
        return head

    def _count(self, effects: list[CoreEffect], answers: dict[str, list[int]], figures: Figures | None) -> None:
        for item in items_of(effects):
            answers[item.request_id] += [token.token_id for token in item.tokens]
            if figures is not None:
                figures.steps += 1
                figures.drafted += item.drafted
                figures.accepted += item.accepted


def groups(prompts: dict[str, list[str]], size: int, tokenizer: Tokenizer) -> Iterator[tuple[str, list[list[int]]]]:
    """(category, prompts of a group), of one category each."""
    for category, texts in prompts.items():
        ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        for begin in range(0, len(ids), size):
            yield category, ids[begin : begin + size]


def report(found: dict[str, dict[str, Figures]], methods: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for category, by_method in found.items():
        for method in methods:
            own, plain = by_method[method], by_method["off"]
            ratios = [a / b for a, b in zip(plain.seconds, own.seconds, strict=True)]
            rows.append(
                {
                    "category": category,
                    "method": method,
                    "tok_s": round(own.tokens / sum(own.seconds), 1),
                    "speed_up": round(sum(plain.seconds) / sum(own.seconds), 3),
                    "median_speed_up": round(statistics.median(ratios), 3),
                    "tokens_per_step": round(own.tokens / own.steps, 3),
                    "accepted_of_drafted": round(own.accepted / own.drafted, 3) if own.drafted else None,
                    "groups": len(own.seconds),
                }
            )
    return rows


def overall(found: dict[str, dict[str, Figures]], methods: list[str]) -> dict[str, dict[str, Figures]]:
    """All categories as one more."""
    total = {method: Figures() for method in methods}
    for by_method in found.values():
        for method, own in by_method.items():
            sums = total[method]
            sums.tokens, sums.steps = sums.tokens + own.tokens, sums.steps + own.steps
            sums.drafted, sums.accepted = sums.drafted + own.drafted, sums.accepted + own.accepted
            sums.seconds += own.seconds
    return {**found, "overall": total}


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """Without folders of this machine."""
    shown = {key: str(value) for key, value in vars(args).items() if key not in ("data", "json")}
    return shown | {"model": Path(args.model).name}


def measure(args: argparse.Namespace) -> dict[str, object]:
    path = resolve(args.model).path
    engine = TorchEngine.load(
        path, model_name="model", dtype=args.dtype, num_blocks=args.blocks, measures_steps=STEPS[-1]
    )
    tokenizer = load_tokenizer(path)
    methods = ["off", *args.methods.split(","), AGAIN]
    workers = {name: Method(name, engine, args.max_draft) for name in methods}
    params = SamplingParams(
        max_tokens=args.tokens, temperature=args.temperature, seed=args.seed, ignore_eos=args.ignore_eos
    )
    found: dict[str, dict[str, Figures]] = defaultdict(lambda: {name: Figures() for name in methods})
    differing = 0
    prompts_by_category = load_prompts(args.data, args.prompts)
    wanted = args.categories.split(",") if args.categories else list(prompts_by_category)
    prompts_by_category = {category: prompts_by_category[category] for category in wanted}
    for number, (category, prompts) in enumerate(groups(prompts_by_category, args.batch, tokenizer)):
        answers = {}
        for name in methods[number % len(methods) :] + methods[: number % len(methods)]:
            answers[name] = workers[name].answer(prompts, params, found[category][name])
        differing += sum(given != answers["off"] for given in answers.values())
        print(f"{number + 1}: {category}", file=sys.stderr)
    return {
        "settings": settings_of(args) | {"native": engine.native_level},
        "groups_with_other_answers": differing,
        "rows": report(overall(found, methods), methods),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", default="ngram,suffix,auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=12, help="of each category")
    parser.add_argument("--categories", help="only these, separated by commas (default: all)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--max-draft", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--blocks", type=int, default=8000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    for row in result["rows"]:  # type: ignore[attr-defined]
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    print(f"groups with other answers: {result['groups_with_other_answers']}")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["groups_with_other_answers"]))


if __name__ == "__main__":
    raise SystemExit(main())
