"""What multiplying in 8 bits costs in accuracy, on real text: `python benchmarks/quant_accuracy.py --data FOLDER`.

Perplexity of windows of two books under the dequantised model in float32, and under each other way to compute the same
weights; how far the predictions move (divergence in nats, and where the likeliest token is another one).

    bfloat16   dequantised, computed in bfloat16
    grouped    4-bit weights as the file stores them, rows in 8 bits
    int8       dequantised and rounded anew to 8 bits, rows in 8 bits: what a model of plain weights becomes
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from penstock.engine.batch import build_batch
from penstock.engine.model_runner import ModelRunner, pool_view
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.models import store
from penstock.models.checkpoint import open_checkpoint
from penstock.models.decoder import Decoder
from penstock.models.tokenizer import load_tokenizer
from penstock.testing.stepper import Stepper

BLOCK_SIZE = 16
BOOKS = ("pride_and_prejudice", "tinyshakespeare")
WAYS = ("bfloat16", "grouped", "int8")


class Predictor(Protocol):
    """One way to compute a model."""

    def predictions(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probabilities behind every token, [tokens, vocab_size] float32."""
        ...


class Way:
    """A `Predictor` out of the engine's own network."""

    def __init__(self, model: Path, name: str, window: int) -> None:
        num_blocks = -(-window // BLOCK_SIZE) + 1
        decoder = load(model, name)
        self._engine = TorchEngine(decoder, model_name="m", identity="m", num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self._pool = pool_view(self._engine.memory, decoder.config, BLOCK_SIZE, decoder.cache_dtype)
        self._runner, self._num_blocks = ModelRunner(decoder, self._pool), num_blocks

    def predictions(self, token_ids: list[int]) -> torch.Tensor:
        stepper = Stepper(self._num_blocks, BLOCK_SIZE)
        batch = build_batch([stepper.schedule(stepper.add(token_ids))], BLOCK_SIZE)
        logits = self._runner.run(replace(batch, sampled_rows=np.arange(len(token_ids))))
        return logits.float().log_softmax(dim=-1)


def load(model: Path, name: str) -> Decoder:
    checkpoint = open_checkpoint(model)
    tensors = checkpoint.grouped_tensors() if name == "grouped" else checkpoint.tensors()
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    return build_decoder(checkpoint.config, tensors, dtype, grouped=name in ("grouped", "int8"))


def windows(data: Path, model: Path, length: int, count: int) -> Iterator[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the books by turns."""
    tokenizer = load_tokenizer(model)
    for number in range(count):
        with gzip.open(data / f"{BOOKS[number % len(BOOKS)]}.txt.gz", "rt", encoding="utf-8") as file:
            text = file.read()
        start = len(text) * (number + 1) // (count + 2)
        yield tokenizer.encode(text[start : start + 8 * length])[:length]


def measure(model: Path, texts: list[list[int]]) -> dict[str, dict[str, float]]:
    window = max(map(len, texts))
    return compare(Way(model, "float32", window), {name: Way(model, name, window) for name in WAYS}, texts)


def compare(base: Predictor, others: Mapping[str, Predictor], texts: list[list[int]]) -> dict[str, dict[str, float]]:
    """Perplexity of `texts` under each, and how far the predictions of `others` are from those of `base`."""
    sums: dict[str, dict[str, float]] = {name: {"nll": 0.0, "divergence": 0.0, "moved": 0.0} for name in others}
    total, nll = 0, 0.0
    for number, token_ids in enumerate(texts, 1):
        reference, targets = base.predictions(token_ids)[:-1], torch.tensor(token_ids[1:])[:, None]
        total += len(targets)
        nll -= float(reference.gather(1, targets).sum())
        for name, way in others.items():
            found = way.predictions(token_ids)[:-1]
            sums[name]["nll"] -= float(found.gather(1, targets).sum())
            sums[name]["divergence"] += float((reference.exp() * (reference - found)).sum())
            sums[name]["moved"] += float((reference.argmax(-1) != found.argmax(-1)).sum())
        print(f"{number} of {len(texts)} windows", file=sys.stderr, flush=True)
    results = {"float32": {"perplexity": math.exp(nll / total), "change": 0.0, "divergence": 0.0, "moved": 0.0}}
    for name, added in sums.items():
        results[name] = {
            "perplexity": math.exp(added["nll"] / total),
            "change": math.expm1((added["nll"] - nll) / total),
            "divergence": added["divergence"] / total,
            "moved": added["moved"] / total,
        }
    return results


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two books as .txt.gz")
    parser.add_argument("--windows", type=int, default=24, help="how many windows (default: 24)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: 512)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main() -> int:
    args = make_parser((__doc__ or "").splitlines()[0]).parse_args()
    model = store.resolve(store.DEFAULT_MODEL).path
    show(model, args, measure(model, list(windows(args.data, model, args.length, args.windows))))
    return 0


def show(model: Path, args: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    """Print the table, and write the figures where `args.json` says."""
    print("| computed as | perplexity | change | divergence, nats | other likeliest token |\n|---|---|---|---|---|")
    for name, row in results.items():
        figures = f"{row['change']:+.2%} | {row['divergence']:.5f} | {row['moved']:.1%}"
        print(f"| {name} | {row['perplexity']:.3f} | {figures} |")
    if args.json is not None:
        record: dict[str, Any] = {"model": model.name, "windows": args.windows, "length": args.length, "ways": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
