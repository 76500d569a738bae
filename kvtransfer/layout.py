"""The layout planner: which bytes of one cache go where in another that is cut and ordered differently.

A model's KV cache is cut twice: tokens into blocks, and heads over the shards (tensor-parallel workers) of a cache. A
shard holds num_kv_heads / tp neighbouring heads; where tp is greater than num_kv_heads, tp / num_kv_heads neighbouring
shards hold the same head. One block of a shard is

    token-major   [num_layers, 2 (K, V), block_size, heads, head_dim]   what `engine.kv_memory` holds, with tp = 1
    head-major    [num_layers, 2 (K, V), heads, block_size, head_dim]

`plan` looks at every pair of a source block and a target block that share tokens and heads. What they share is a box
of layers × tokens × heads, and the box falls into equal runs at regular distances, so a plan costs as much as it has
runs: one a block where both sides agree. Pure arithmetic, no bytes: tests move random caches by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ..core.errors import LayoutMismatch

Order = Literal["token-major", "head-major"]
_NEVER_MAPPED = ("num_layers", "num_kv_heads", "head_dim", "itemsize")


class BadLayout(LayoutMismatch):
    """`field` of a layout or of a request for a plan is impossible; the text names it, its value and what fits."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How one cache lies in memory. `num_kv_heads` counts the whole model's, `itemsize` is bytes of one number.

    Raises BadLayout.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    block_size: int
    order: Order = "token-major"
    tp: int = 1

    def __post_init__(self) -> None:
        for field in (*_NEVER_MAPPED, "block_size", "tp"):
            if getattr(self, field) < 1:
                raise BadLayout(field, f"{getattr(self, field)} is not positive")
        if self.order not in get_args(Order):
            raise BadLayout("order", f"{self.order!r} is not one of {', '.join(get_args(Order))}")
        if self.num_kv_heads % self.tp and self.tp % self.num_kv_heads:
            raise BadLayout(
                "tp", f"{self.num_kv_heads} KV heads cannot be shared by {self.tp} shards; use a divisor or a multiple"
            )

    @property
    def heads_per_shard(self) -> int:
        return max(1, self.num_kv_heads // self.tp)

    @property
    def num_replicas(self) -> int:
        """Shards that hold the same heads."""
        return max(1, self.tp // self.num_kv_heads)

    @property
    def head_bytes(self) -> int:
        """K or V of one token, one layer, one head: the smallest run there is."""
        return self.head_dim * self.itemsize

    @property
    def plane_bytes(self) -> int:
        """K or V of one layer of one shard's block."""
        return self.block_size * self.heads_per_shard * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """One shard's block in all layers."""
        return 2 * self.num_layers * self.plane_bytes

    @property
    def token_stride(self) -> int:
        """Bytes from a token to the next within one head."""
        return self.head_bytes * (self.heads_per_shard if self.order == "token-major" else 1)

    @property
    def head_stride(self) -> int:
        """Bytes from a head to the next within one token."""
        return self.head_bytes * (1 if self.order == "token-major" else self.block_size)

    def heads(self, shard: int) -> range:
        """The model's heads that this shard holds."""
        start = shard // self.num_replicas * self.heads_per_shard
        return range(start, start + self.heads_per_shard)


class Copy(NamedTuple):
    """`nbytes` from one shard's block to another's. Ordinals count blocks of the sequence, offsets bytes in a block."""

    source_shard: int
    source_ordinal: int
    source_offset: int
    target_shard: int
    target_ordinal: int
    target_offset: int
    nbytes: int


class Run(NamedTuple):
    """Bytes that are neighbours on both sides; offsets as in `Copy`."""

    source_offset: int
    target_offset: int
    nbytes: int


class _Box(NamedTuple):
    """What one source block and one target block share, each counted from its own block's first token and head."""

    source_token: int
    target_token: int
    num_tokens: int
    source_head: int
    target_head: int
    num_heads: int


class _Segment(NamedTuple):
    """Tokens [start, stop) that lie in one block on either side."""

    source_ordinal: int
    target_ordinal: int
    start: int
    stop: int


def compatible(source: CacheLayout, target: CacheLayout) -> str | None:
    """The first field in which these two differ and that no plan can bridge; None when there is a plan."""
    return next((field for field in _NEVER_MAPPED if getattr(source, field) != getattr(target, field)), None)


def plan(source: CacheLayout, target: CacheLayout, tokens: range, layers: range) -> list[Copy]:
    """The fewest copies that bring `tokens` (positions in the sequence) of `layers` from `source` to `target`.

    Every target shard gets each of its bytes once; the list is in order of target shard, then token. Source shards that
    hold the same head take turns, block by block. Raises BadLayout.
    """
    _check(source, target, tokens, layers)
    runs_of: dict[_Box, list[Run]] = {}
    segments = list(_segments(source.block_size, target.block_size, tokens)) if layers else []
    copies: list[Copy] = []
    for target_shard in range(target.tp):
        for segment in segments:
            for group in _source_groups(source, target.heads(target_shard)):
                source_shard = _replica(source, target, group, target_shard, segment.source_ordinal)
                box = _box(source, target, source_shard, target_shard, segment)
                if box not in runs_of:
                    runs_of[box] = _merged(_runs(source, target, box, layers))
                copies += [
                    Copy(source_shard, segment.source_ordinal, at, target_shard, segment.target_ordinal, to, nbytes)
                    for at, to, nbytes in runs_of[box]
                ]
    return copies


def _check(source: CacheLayout, target: CacheLayout, tokens: range, layers: range) -> None:
    field = compatible(source, target)
    if field is not None:
        values = f"{getattr(source, field)} at the source, {getattr(target, field)} at the target"
        raise BadLayout(field, f"{values}; both must hold the same model in numbers of the same size")
    for name, wanted, bound in (("tokens", tokens, None), ("layers", layers, source.num_layers)):
        if wanted.step != 1 or wanted.start < 0 or (bound is not None and wanted.stop > bound):
            raise BadLayout(name, f"{wanted} is not a range of step 1 in [0, {'…' if bound is None else bound})")


def _segments(source_size: int, target_size: int, tokens: range) -> Iterator[_Segment]:
    start = tokens.start
    while start < tokens.stop:
        ordinals = start // source_size, start // target_size
        stop = min((ordinals[0] + 1) * source_size, (ordinals[1] + 1) * target_size, tokens.stop)
        yield _Segment(*ordinals, start, stop)
        start = stop


def _source_groups(source: CacheLayout, heads: range) -> range:
    """Groups of source shards with the same heads, numbered by these, that hold some of `heads`."""
    return range(heads.start // source.heads_per_shard, (heads.stop - 1) // source.heads_per_shard + 1)


def _replica(source: CacheLayout, target: CacheLayout, group: int, target_shard: int, ordinal: int) -> int:
    """The source shard of `group` that serves this target shard in block `ordinal`.

    All target shards that want the same head line up, block after block, and the replicas are dealt out to the line.
    Where that comes out even, a target shard meets the same source shard in every block.
    """
    turn = ordinal * target.num_replicas + target_shard % target.num_replicas
    return group * source.num_replicas + turn % source.num_replicas


def _box(source: CacheLayout, target: CacheLayout, source_shard: int, target_shard: int, segment: _Segment) -> _Box:
    held, wanted = source.heads(source_shard), target.heads(target_shard)
    first, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
    return _Box(
        source_token=segment.start % source.block_size,
        target_token=segment.start % target.block_size,
        num_tokens=segment.stop - segment.start,
        source_head=first - held.start,
        target_head=first - wanted.start,
        num_heads=stop - first,
    )


def _runs(source: CacheLayout, target: CacheLayout, box: _Box, layers: range) -> Iterator[Run]:
    """The box as equal runs, ascending at the source: dimensions are folded into the run while both sides go on."""
    by_token = (box.num_tokens, source.token_stride, target.token_stride)
    by_head = (box.num_heads, source.head_stride, target.head_stride)
    inner = [by_token, by_head] if source.order == "token-major" else [by_head, by_token]
    dimensions = [(2 * len(layers), source.plane_bytes, target.plane_bytes), *inner]  # count, distance on either side
    dimensions = [dimension for dimension in dimensions if dimension[0] != 1]
    nbytes = source.head_bytes
    while dimensions and dimensions[-1][1:] == (nbytes, nbytes):
        nbytes *= dimensions.pop()[0]
    first = _start(source, layers, box.source_token, box.source_head)
    starts = [(first, _start(target, layers, box.target_token, box.target_head))]
    for count, step, target_step in dimensions:
        starts = [(at + i * step, to + i * target_step) for at, to in starts for i in range(count)]
    return (Run(at, to, nbytes) for at, to in starts)


def _start(layout: CacheLayout, layers: range, token: int, head: int) -> int:
    return 2 * layers.start * layout.plane_bytes + token * layout.token_stride + head * layout.head_stride


def _merged(runs: Iterator[Run]) -> list[Run]:
    """Runs that touch on both sides become one: between two planes, token-major meets head-major at the corners."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last and run[:2] == (last.source_offset + last.nbytes, last.target_offset + last.nbytes):
            found[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        else:
            found.append(run)
    return found
