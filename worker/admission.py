"""Block bookkeeping that both roles share: a sequence enters the pool, grows, is published, and leaves it."""

from __future__ import annotations

from ..core.ids import BlockId
from ..engine.block_pool import BlockPool
from ..engine.interface import EngineSpec, ScheduledSeq
from ..engine.sequence import Sequence, blocks_for
from ..protocol.messages import Fingerprint
from ..protocol.sampling import SamplingParams
from .role import Budget


def cache_key(salt: str, fingerprint: Fingerprint) -> bytes:
    """The prefix-cache key of one tenant on this worker: the salt, and everything that changes the bytes of a block."""
    return fingerprint.cache_key(salt)


def refuse(prompt_ids: list[int], output_ids: list[int], params: SamplingParams, spec: EngineSpec) -> str | None:
    """Why this request can never run here, or None. The engine's door: nothing the gateway checked is trusted."""
    if not prompt_ids:
        return "the prompt has no tokens"
    highest = max(*prompt_ids, *output_ids, *params.logit_bias, *params.stop_token_ids, 0)
    if highest >= spec.vocab_size:
        return f"token id {highest} is outside the vocabulary of {spec.vocab_size}"
    if len(output_ids) >= params.max_tokens:
        return f"{len(output_ids)} tokens are there already, max_tokens is {params.max_tokens}"
    total = len(prompt_ids) + params.max_tokens
    if total > spec.max_sequence_tokens:
        return (
            f"{len(prompt_ids)} prompt tokens + max_tokens {params.max_tokens} = {total} tokens, this worker holds "
            f"{spec.max_sequence_tokens}; lower max_tokens or start the worker with more KV blocks"
        )
    return None


def match_blocks(seq: Sequence, pool: BlockPool, *, keep_last: bool) -> list[BlockId]:
    """Cached blocks that cover the head of `seq`.

    With `keep_last` at least one token stays to be computed, for its logits.
    """
    hashes = seq.hashes(pool.block_size)
    usable = (seq.num_tokens - 1) // pool.block_size if keep_last else len(hashes)
    return pool.match_prefix(hashes[:usable])


def try_admit(seq: Sequence, pool: BlockPool, reserve: int) -> int | None:
    """Give `seq` blocks for all its tokens, reusing its cached prefix, and leave `reserve` blocks free.

    Returns the number of reused blocks, or None (and nothing has changed) when there is no room.
    """
    held = match_blocks(seq, pool, keep_last=True)
    fresh = blocks_for(seq.num_tokens, pool.block_size) - len(held)
    pool.acquire(held)
    if not pool.can_allocate(fresh + reserve):
        pool.free(held)
        return None
    seq.block_table = held + pool.allocate(fresh)
    seq.num_cached_tokens = seq.num_computed_tokens = len(held) * pool.block_size
    seq.num_published_blocks = len(held)
    return len(held)


def try_grow(seq: Sequence, pool: BlockPool) -> bool:
    """Make sure the table covers every token of `seq`; False when the pool has no block left."""
    return pool.grow(seq.block_table, seq.num_tokens)


def next_chunk(seq: Sequence, budget: Budget, now: float) -> ScheduledSeq | None:
    """The next piece of `seq` that the budget allows, taken from it; None when it allows nothing."""
    num_new = min(seq.num_uncomputed_tokens, budget.num_tokens)
    if num_new <= 0 or budget.num_seqs <= 0:
        return None
    budget.num_tokens -= num_new
    budget.num_seqs -= 1
    if seq.first_scheduled is None:
        seq.first_scheduled = now
    return ScheduledSeq(seq, num_new)


def publish_computed(seq: Sequence, pool: BlockPool) -> None:
    """Make the full, computed blocks of `seq` findable for others."""
    num_full = seq.num_computed_tokens // pool.block_size
    if num_full <= seq.num_published_blocks:
        return
    hashes = seq.hashes(pool.block_size)
    for i in range(seq.num_published_blocks, num_full):
        pool.publish(seq.block_table[i], hashes[i])
    seq.num_published_blocks = num_full


def release(seq: Sequence, pool: BlockPool) -> None:
    """Give all blocks back; deepest first, so that the head of a prefix is evicted last. The tokens stay."""
    pool.free(seq.block_table[::-1])
    seq.block_table = []
    seq.num_computed_tokens = seq.num_cached_tokens = seq.num_published_blocks = 0
