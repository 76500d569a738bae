"""What steps cost on this machine, measured when an engine starts.

How large a prefill chunk has to be: from some number of tokens on a step computes each of them no faster. A smaller
chunk wastes the machine. A larger one gains nothing, but the sequences that decode beside it wait longer for their next
token, and the first of its keys and values leave later.

And what a decode step takes by its tokens, which decides how many drafted ones it may verify (`speculation.step_cost`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from ..models.decoder import Decoder
from .batch import Batch
from .interface import StepCosts
from .model_runner import ModelRunner
from .sequence import blocks_for

CHUNKS = (128, 256, 512, 1024)
GAIN = 1.05  # twice the tokens must be computed so many times as fast to be worth it
PROBE, PROBE_S = 16, 0.06  # where so few tokens take longer, any chunk saturates, and measuring one would take seconds
_ROUNDS = 2
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens of a decode step
FAR, FURTHER = 512, 8  # cached tokens, and tokens of a step, that show what attention takes
_STEP_ROUNDS, _STEP_S = 3, 0.25  # where a step takes longer, larger ones are not measured

log = logging.getLogger(__name__)


def saturation_tokens(seconds: Callable[[int], float], longest: int) -> int:
    """The smallest of CHUNKS, up to `longest` tokens, that a chunk of twice the size does not outdo.

    seconds(n): time of a step that computes n tokens of one prompt.
    """
    chosen, rate = CHUNKS[0], 0.0
    if seconds(min(PROBE, longest)) > PROBE_S:
        return chosen
    for chunk in CHUNKS:
        if chunk > longest:
            break
        faster = chunk / seconds(chunk)
        if faster < rate * GAIN:
            break
        chosen, rate = chunk, faster
    return chosen


def measure_saturation(decoder: Decoder, block_size: int, num_threads: int) -> int:
    """Tokens of a chunk for this network on this machine, in a pool of its own that goes when it is measured."""
    config = decoder.config
    longest = min(CHUNKS[-1], decoder.max_context)
    shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
    pool = torch.zeros(blocks_for(longest, block_size), *shape, dtype=decoder.cache_dtype)
    runner = ModelRunner(decoder, pool)
    runner.num_threads = num_threads

    def seconds(chunk: int) -> float:
        return min(_timed(lambda: runner.run(_prompt(chunk, block_size, config.vocab_size))) for _ in range(_ROUNDS))

    started = time.perf_counter()
    found = saturation_tokens(seconds, longest)
    log.info("prefill in chunks of %d tokens (measured in %.1f s)", found, time.perf_counter() - started)
    return found


def measure_steps(decoder: Decoder, block_size: int, num_threads: int, longest: int = STEPS[-1]) -> StepCosts:
    """What decode steps of this network take on this machine, of up to `longest` tokens."""
    config = decoder.config
    far = min(FAR, decoder.max_context - FURTHER)
    shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
    blocks = max(blocks_for(far + FURTHER, block_size), blocks_for(STEPS[-1], block_size))
    pool = torch.zeros(blocks, *shape, dtype=decoder.cache_dtype)
    runner = ModelRunner(decoder, pool)
    runner.num_threads = num_threads

    def seconds(new: int, cached: int) -> float:
        batch = _step(new, cached, block_size)
        return min(_timed(lambda: runner.step(batch)) for _ in range(_STEP_ROUNDS))

    started = time.perf_counter()
    costs = step_costs(seconds, far, min(longest, decoder.max_context))
    log.info("decode steps from %.1f ms (measured in %.1f s)", costs.curve[0][1] * 1e3, time.perf_counter() - started)
    return costs


def step_costs(seconds: Callable[[int, int], float], far: int, longest: int) -> StepCosts:
    """seconds(new, cached): time of a step that computes and samples `new` tokens behind `cached` ones."""
    curve: list[tuple[int, float]] = []
    for tokens in STEPS:
        if tokens > longest or (curve and curve[-1][1] > _STEP_S):
            break
        curve.append((tokens, max(seconds(tokens, 0), curve[-1][1] if curve else 0.0)))
    near = dict(curve)
    context_s = max(seconds(1, far) - near[1], 0.0) / far
    query_s = max(seconds(FURTHER, far) - near.get(FURTHER, curve[-1][1]) - context_s * far, 0.0) / (FURTHER - 1) / far
    return StepCosts(tuple(curve), context_s, query_s)


def _step(new: int, cached: int, block_size: int) -> Batch:
    """`new` tokens of one sequence, all sampled, behind `cached` ones."""
    at, count = np.arange(cached, cached + new), cached + new
    blocks = np.arange(blocks_for(count, block_size))[None]
    nothing = np.empty(0, np.int64)
    return Batch(
        np.zeros(new, np.int64), at, at, np.array([0, new]), np.array([count]), blocks, np.arange(new), nothing
    )


def _prompt(length: int, block_size: int, vocab_size: int) -> Batch:
    """One prompt whose last token is sampled."""
    tokens = np.arange(length)
    nothing = np.empty(0, np.int64)
    blocks = np.arange(blocks_for(length, block_size))[None]
    last = tokens[-1:]
    return Batch(tokens % vocab_size, tokens, tokens, np.array([0, length]), np.array([length]), blocks, last, nothing)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
