"""How large a prefill chunk has to be: from some number of tokens on a step computes each of them no faster.

A smaller chunk wastes the machine. A larger one gains nothing, but the sequences that decode beside it wait longer for
their next token, and the first of its keys and values leave later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from ..models.decoder import Decoder
from .batch import Batch
from .model_runner import ModelRunner
from .sequence import blocks_for

CHUNKS = (128, 256, 512, 1024)
GAIN = 1.05  # twice the tokens must be computed so many times as fast to be worth it
PROBE, PROBE_S = 16, 0.06  # where so few tokens take longer, any chunk saturates, and measuring one would take seconds
_ROUNDS = 2

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
