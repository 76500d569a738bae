"""One generation: its tokens, its blocks, and how far the cache has caught up. Pure data; who schedules it decides.

token index      0 ........... num_cached ........... num_computed ........... num_tokens
KV in the cache  [ from the prefix cache | computed here ) [ to be computed next )
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.ids import AttemptKey, BlockId
from ..core.prefix_hash import BlockHash, extend_block_hashes
from ..protocol.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output of one choice of one attempt, with the table of its blocks (index in the sequence → block
    id).
    """

    key: AttemptKey
    choice: int
    prompt_ids: list[int]
    params: SamplingParams
    hash_key: bytes
    arrival: float
    deadline: float
    output_ids: list[int] = field(default_factory=list)
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_published_blocks: int = 0
    num_parked_tokens: int = 0  # leading tokens whose KV waits in host memory (`engine.parking`)
    sample_choices: tuple[int, ...] = ()  # choices to sample at the end of the prompt; empty means this one only
    first_scheduled: float | None = None
    compute_s: float = 0.0  # within steps that computed a chunk of its prompt
    work_s: float = 0.0  # its share of those steps by tokens
    told_at: float | None = None  # when its last tokens were drawn

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is missing from the cache."""
        return self.num_uncomputed_tokens > 1 or not self.output_ids

    @property
    def choices(self) -> tuple[int, ...]:
        """The choices whose next token is sampled when the cache has caught up."""
        return self.sample_choices or (self.choice,)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids [start, stop) over prompt and output."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return self.prompt_ids[start:] + self.output_ids[: stop - split]

    def hashes(self, block_size: int) -> list[BlockHash]:
        """Hash of every full block of tokens so far."""
        if len(self.block_hashes) < self.num_tokens // block_size:
            extend_block_hashes(self.block_hashes, self.hash_key, self.tokens(0, self.num_tokens), block_size)
        return self.block_hashes


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
