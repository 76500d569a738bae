"""What each wire format costs in accuracy, on a real model and real text: `python benchmarks/wire_accuracy.py`.

For each text and cache type: prefill its first tokens, take their KV through the wire format (encode, decode), and go
on from there in two ways, always beside a sequence whose KV was left alone, in the same batches:

    perplexity   the real tokens that follow are fed in and predicted; and how far the predictions moved: the mean
                 Kullback-Leibler divergence, and how often the likeliest token stayed the same
    greedy       tokens are chosen freely: how many are equal before the first that differs, and how many at all

A format that only copies bits must change nothing at all; where it does, the run ends with an error.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.benchmarks.quick import RESULTS, commit, machine
from penstock.engine.batch import build_batch
from penstock.engine.model_runner import ModelRunner, pool_view
from penstock.engine.sequence import Sequence
from penstock.engine.torch_engine import TorchEngine, resolve_dtype
from penstock.kernels.wire_format.formats import WIRE_DTYPES, wire_layer_bytes
from penstock.kernels.wire_format.op import decode, encode
from penstock.models import store
from penstock.models.checkpoint import open_checkpoint
from penstock.models.tokenizer import Tokenizer, load_tokenizer
from penstock.testing.stepper import Stepper

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BLOCK_SIZE = 16
CHARACTERS_PER_TOKEN = 8  # more than any of the texts has, so that a piece is never too short


@dataclass(frozen=True, slots=True)
class Amounts:
    """Tokens of a text: put through the wire, then predicted, then chosen. The last block of a prompt is a part."""

    prompt: int = 520
    predicted: int = 128
    chosen: int = 64

    @property
    def needed(self) -> int:
        return self.prompt + self.predicted + 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """One text through one format, against the same text left alone. Logarithms are natural."""

    text: str
    nll: float  # mean negative log-likelihood of the real tokens
    divergence: float
    same_likeliest: float
    equal_prefix: int
    equal_tokens: int


def pieces(data: Path, count: int, num_characters: int) -> Iterator[tuple[str, str]]:
    """`count` texts of four kinds by turns, as (name, text): two books, meetings, and worked sums."""
    each = -(-count // 4)
    kinds = [
        _excerpts("austen", _read(data / "public-domain-text" / "pride_and_prejudice.txt.gz"), each, num_characters),
        _excerpts("shakespeare", _read(data / "public-domain-text" / "tinyshakespeare.txt.gz"), each, num_characters),
        _meetings(data / "qmsum-meetings" / "meetings.jsonl.gz", each, num_characters),
        _excerpts("sums", _sums(data / "gsm8k" / "test.jsonl.gz"), each, num_characters),
    ]
    for found, _ in zip((piece for turn in zip(*kinds, strict=True) for piece in turn), range(count), strict=False):
        yield found


def _read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _excerpts(name: str, text: str, count: int, num_characters: int) -> list[tuple[str, str]]:
    """Evenly spaced, each from the beginning of a paragraph."""
    starts = [text.index("\n\n", len(text) * i // (count + 1)) + 2 for i in range(count)]
    return [(f"{name}-{start}", text[start : start + num_characters]) for start in starts]


def _meetings(path: Path, count: int, num_characters: int) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in _read(path).splitlines()]
    chosen = [rows[len(rows) * i // count] for i in range(count)]
    return [(row["id"], re.sub(r"\{\w+\} ?", "", row["document"])[:num_characters]) for row in chosen]


def _sums(path: Path) -> str:
    rows = (json.loads(line) for line in _read(path).splitlines())
    return "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)


class Comparison:
    """One engine, and sequences in it that differ in how the KV of their prompt came there."""

    def __init__(self, model: Path, dtype: str, amounts: Amounts) -> None:
        self.amounts = amounts
        num_blocks = (2 + len(WIRE_DTYPES)) * -(-(amounts.needed + amounts.chosen) // BLOCK_SIZE)
        self.engine = TorchEngine.load(
            model, model_name="benchmark", dtype=dtype, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_threads=1
        )
        config = self.engine.decoder.config
        self.pool = pool_view(self.engine.memory, config, BLOCK_SIZE, resolve_dtype(dtype))
        self._runner = ModelRunner(self.engine.decoder, self.pool)
        self._num_blocks = num_blocks

    def run(self, name: str, token_ids: list[int]) -> dict[str, Outcome]:
        """Outcome by wire dtype; "unconverted" is the sequence left alone, compared to itself."""
        stepper = Stepper(self._num_blocks, BLOCK_SIZE)
        first = stepper.add(token_ids[: self.amounts.prompt])
        stepper.generate(self.engine, [first], 1)
        names = ["unconverted", *WIRE_DTYPES]
        seqs = [self._converted(stepper, first, wire) for wire in (None, *WIRE_DTYPES)]
        logprobs = self._predict(stepper, seqs, token_ids)
        for seq in seqs:
            seq.output_ids, seq.num_computed_tokens = first.output_ids[:1], self.amounts.prompt
        stepper.generate(self.engine, seqs, 1 + self.amounts.chosen)
        targets = torch.tensor(token_ids[self.amounts.prompt + 1 : self.amounts.needed])
        return {
            wire: _outcome(name, targets, logprobs[0], logprobs[i], seqs[0].output_ids[1:], seqs[i].output_ids[1:])
            for i, wire in enumerate(names)
        }

    def _converted(self, stepper: Stepper, first: Sequence, wire_dtype: str | None) -> Sequence:
        """A sequence with the prompt of `first` and blocks of its own, filled by way of the wire."""
        seq = stepper.add(first.prompt_ids, output_ids=first.output_ids[:1])
        stepper.schedule(seq, self.amounts.prompt)
        seq.num_computed_tokens = self.amounts.prompt
        kv = self.pool[torch.tensor(first.block_table)]
        if wire_dtype is not None:
            layers = kv.flatten(0, 1)
            _, _, block_size, num_kv_heads, head_dim = layers.shape
            width = wire_layer_bytes(block_size, num_kv_heads, head_dim, wire_dtype)
            data = torch.empty(layers.shape[0], width, dtype=torch.uint8)
            encode(layers, data, wire_dtype)
            kv = torch.full_like(kv, torch.nan)
            decode(data, kv.flatten(0, 1), wire_dtype)
        self.pool[torch.tensor(seq.block_table)] = kv
        return seq

    def _predict(self, stepper: Stepper, seqs: list[Sequence], token_ids: list[int]) -> torch.Tensor:
        """Log-probabilities after each of the real tokens, [seqs, predicted, vocab_size] float32."""
        for seq in seqs:
            seq.output_ids = token_ids[self.amounts.prompt : self.amounts.needed]
        entries = [stepper.schedule(seq, self.amounts.predicted) for seq in seqs]
        batch = build_batch(entries, BLOCK_SIZE)
        logits = self._runner.run(replace(batch, sampled_rows=np.arange(len(batch.token_ids))))
        return logits.float().log_softmax(dim=-1).view(len(seqs), self.amounts.predicted, -1)


def _outcome(
    text: str, targets: torch.Tensor, alone: torch.Tensor, other: torch.Tensor, wanted: list[int], chosen: list[int]
) -> Outcome:
    equal = [a == b for a, b in zip(wanted, chosen, strict=True)]
    return Outcome(
        text=text,
        nll=-float(other.gather(1, targets[:, None]).mean()),
        divergence=float((alone.exp() * (alone - other)).sum(dim=-1).mean()),
        same_likeliest=float((alone.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()),
        equal_prefix=[*equal, False].index(False),
        equal_tokens=sum(equal),
    )


def measure(model: Path, dtype: str, texts: list[tuple[str, list[int]]], amounts: Amounts) -> dict[str, list[Outcome]]:
    comparison = Comparison(model, dtype, amounts)
    found: dict[str, list[Outcome]] = {}
    for number, (name, token_ids) in enumerate(texts, 1):
        for wire_dtype, outcome in comparison.run(name, token_ids).items():
            found.setdefault(wire_dtype, []).append(outcome)
        print(f"{dtype}: {number} of {len(texts)} texts, {name}", file=sys.stderr, flush=True)
    copied = found[dtype]
    if any(outcome.divergence or outcome.equal_tokens < amounts.chosen for outcome in copied):
        raise RuntimeError(f"{dtype} through a wire of {dtype} only copies bits, and yet the answers differ")
    return found


def summary(outcomes: list[Outcome], alone: list[Outcome], amounts: Amounts) -> dict[str, float]:
    """Means over the texts; a perplexity is that of all predicted tokens together."""
    nll, reference = (statistics.fmean(o.nll for o in group) for group in (outcomes, alone))
    return {
        "perplexity": float(np.exp(nll)),
        "perplexity_change": float(np.expm1(nll - reference)),
        "divergence": statistics.fmean(o.divergence for o in outcomes),
        "same_likeliest": statistics.fmean(o.same_likeliest for o in outcomes),
        "equal_prefix": statistics.fmean(o.equal_prefix for o in outcomes),
        "equal_tokens": statistics.fmean(o.equal_tokens / amounts.chosen for o in outcomes),
        "equal_answers": sum(o.equal_tokens == amounts.chosen for o in outcomes),
    }


def report(record: dict[str, Any]) -> str:
    amounts, count = Amounts(**record["amounts"]), len(record["texts"])
    lines = [
        "| cache | wire | bytes | perplexity | change | divergence, nats | same likeliest token | greedy: equal prefix "
        f"of {amounts.chosen} | equal tokens | equal answers of {count} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype, formats in record["results"].items():
        for wire, found in formats.items():
            size = "" if wire == "unconverted" else f"{found['bytes_to_cache']:.1%}"
            lines.append(
                f"| {dtype} | {wire} | {size} | {found['perplexity']:.3f} | {found['perplexity_change']:+.2%} | "
                f"{found['divergence']:.1e} | {found['same_likeliest']:.1%} | {found['equal_prefix']:.1f} | "
                f"{found['equal_tokens']:.1%} | {found['equal_answers']} |"
            )
    return "\n".join(lines)


def _results(model: Path, dtype: str, texts: list[tuple[str, list[int]]], amounts: Amounts) -> dict[str, Any]:
    found = measure(model, dtype, texts, amounts)
    rows: dict[str, Any] = {}
    for wire, outcomes in found.items():
        rows[wire] = summary(outcomes, found["unconverted"], amounts)
        if wire != "unconverted":
            rows[wire]["bytes_to_cache"] = _bytes_to_cache(model, wire, dtype)
        rows[wire]["by_text"] = [asdict(outcome) for outcome in outcomes]
    return rows


def _bytes_to_cache(model: Path, wire: str, dtype: str) -> float:
    config = open_checkpoint(model).config
    on_wire, in_cache = (
        wire_layer_bytes(BLOCK_SIZE, config.num_kv_heads, config.head_dim, name) for name in (wire, dtype)
    )
    return on_wire / in_cache


def _tokenized(tokenizer: Tokenizer, args: argparse.Namespace, amounts: Amounts) -> list[tuple[str, list[int]]]:
    texts = [
        (name, tokenizer.encode(text)[: amounts.needed])
        for name, text in pieces(args.data, args.texts, amounts.needed * CHARACTERS_PER_TOKEN)
    ]
    for name, token_ids in texts:
        if len(token_ids) < amounts.needed:
            raise RuntimeError(f"{name} has {len(token_ids)} tokens of {amounts.needed}; raise CHARACTERS_PER_TOKEN")
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the data sets (default: {DATA})")
    parser.add_argument("--texts", type=int, default=16, help="texts, of four kinds by turns (default: 16)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="cache types (default: float32,bfloat16)")
    parser.add_argument(
        "--json", type=Path, default=None, help="where to write the results (a bare name: in benchmarks/results/)"
    )
    args = parser.parse_args()
    model, amounts = store.resolve(store.DEFAULT_MODEL, download=False).path, Amounts()
    texts = _tokenized(load_tokenizer(model), args, amounts)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "model": store.DEFAULT_MODEL,
        "amounts": asdict(amounts),
        "texts": [name for name, _ in texts],
        "results": {dtype: _results(model, dtype, texts, amounts) for dtype in args.dtypes.split(",")},
    }
    print(report(record))
    if args.json is not None:
        path = RESULTS / args.json if args.json.parent == Path() else args.json
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
