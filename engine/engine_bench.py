"""How fast an engine decodes and prefills on this machine, what a step costs beside its kernels, and how near that is
to what the machine can do at all. Greedy decoding of random prompts, every step over the whole batch.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import msgspec
import torch

from ..core.ids import AttemptKey, BlockId
from ..protocol.sampling import SamplingParams
from .interface import ScheduledSeq
from .sequence import Sequence, blocks_for
from .torch_engine import TorchEngine

CONTEXT, NEW_TOKENS = 128, 64
READ_BYTES, MATRIX_SIDE, BRIEF_S = 512 << 20, 1536, 0.05

Say = Callable[[str], None]


class EngineFigures(msgspec.Struct, frozen=True):
    """Tokens per second by batch size and by prompt length; medians of `rounds`.

    `step_overhead_ms`: the part of a decode step outside the network, by batch size. `weight_bytes`: what every step
    has to read. Shares: of the time that reading these bytes (decode, batch 1), or multiplying (prefill of the longest
    prompt, by its linear layers alone), takes at the measured limits.
    """

    decode_tok_s: dict[str, float]
    prefill_tok_s: dict[str, float]
    step_overhead_ms: dict[str, float]
    kv_bytes_per_token: int
    weight_bytes: int
    read_gb_s: float
    matrix_gflop_s: float
    share_of_read_limit: float
    share_of_matrix_limit: float
    dtype: str
    quantization: str
    native: str
    threads: int
    rounds: int


def measure_engine(
    engine: TorchEngine, batches: list[int], prompts: list[int], rounds: int, seed: int, say: Say
) -> EngineFigures:
    """Needs a pool that holds the largest batch and the longest prompt; raises ValueError for one that does not."""
    bench = _Bench(engine, random.Random(seed))
    decode: dict[str, float] = {}
    overhead: dict[str, float] = {}
    for batch in batches:
        runs = [bench.decode(batch) for _ in range(rounds)]
        decode[str(batch)] = round(statistics.median(rate for rate, _ in runs), 1)
        overhead[str(batch)] = round(statistics.median(outside for _, outside in runs), 3)
        say(f"decode, batch {batch}: {decode[str(batch)]} tok/s, {overhead[str(batch)]} ms of a step outside")
    prefill: dict[str, float] = {}
    for length in prompts:
        prefill[str(length)] = round(statistics.median(bench.prefill(length) for _ in range(rounds)), 1)
        say(f"prefill of {length} tokens: {prefill[str(length)]} tok/s")
    torch.set_num_threads(engine.num_threads)
    read, matrix = read_limit(), matrix_limit()
    nbytes, weights = engine.decoder.weight_bytes, engine.decoder.linear_weights
    longest = prefill[str(max(prompts))] if prompts else 0.0
    return EngineFigures(
        decode_tok_s=decode,
        prefill_tok_s=prefill,
        step_overhead_ms=overhead,
        kv_bytes_per_token=engine.spec.bytes_per_token,
        weight_bytes=nbytes,
        read_gb_s=round(read / 1e9, 1),
        matrix_gflop_s=round(matrix / 1e9),
        share_of_read_limit=round(decode.get("1", 0.0) * nbytes / read, 3),
        share_of_matrix_limit=round(longest * 2 * weights / matrix, 3),
        dtype=engine.spec.fingerprint.dtype,
        quantization=engine.quantization,
        native=engine.native_level,
        threads=engine.num_threads,
        rounds=rounds,
    )


def read_limit() -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over half a GiB."""
    data = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best(lambda: data.sum())


def matrix_limit() -> float:
    """Floating point operations per second of a large product, bfloat16 where it is faster than float32."""
    return max(_matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16))


def _matrix_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype) for _ in range(2))
    return 2 * MATRIX_SIDE**3 / _best(lambda: a @ b)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs; at least five, and so many that they are not all too brief."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < BRIEF_S * 5 and len(times) < 200):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


class _Bench:
    """Fills the pool from its first block on, anew for each measurement."""

    def __init__(self, engine: TorchEngine, rng: random.Random) -> None:
        self._engine, self._rng = engine, rng

    def decode(self, batch: int) -> tuple[float, float]:
        """Tokens per second while `batch` sequences decode, and milliseconds of a step outside the network."""
        seqs = self._sequences(batch, CONTEXT, NEW_TOKENS + 1)
        for seq in seqs:
            self._step([seq])
        self._engine.network_s = 0.0
        started = time.perf_counter()
        for _ in range(NEW_TOKENS):
            self._step(seqs)
        seconds = time.perf_counter() - started
        return batch * NEW_TOKENS / seconds, (seconds - self._engine.network_s) / NEW_TOKENS * 1000

    def prefill(self, length: int) -> float:
        """Tokens per second from a prompt to its first token, in one chunk."""
        seqs = self._sequences(1, length, 1)
        started = time.perf_counter()
        self._step(seqs)
        return length / (time.perf_counter() - started)

    def _step(self, seqs: list[Sequence]) -> None:
        entries = [ScheduledSeq(seq, seq.num_uncomputed_tokens) for seq in seqs]
        for seq, sampled in zip(seqs, self._engine.execute(entries), strict=True):
            seq.num_computed_tokens = seq.num_tokens
            seq.output_ids += [token.token_id for token in sampled]

    def _sequences(self, count: int, length: int, new_tokens: int) -> list[Sequence]:
        spec = self._engine.spec
        blocks = blocks_for(length + new_tokens, spec.block_size)
        if count * blocks > spec.num_blocks or length + new_tokens > spec.max_sequence_tokens:
            raise ValueError(f"{count} x {length + new_tokens} tokens do not fit the pool or the model's window")
        return [self._sequence(number, length, blocks) for number in range(count)]

    def _sequence(self, number: int, length: int, blocks: int) -> Sequence:
        vocabulary = range(self._engine.spec.vocab_size)
        first = number * blocks
        return Sequence(
            key=AttemptKey(f"bench-{number}", 0),
            choice=0,
            prompt_ids=self._rng.choices(vocabulary, k=length),
            params=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
            hash_key=b"",
            arrival=0.0,
            deadline=0.0,
            block_table=[BlockId(first + at) for at in range(blocks)],
        )
