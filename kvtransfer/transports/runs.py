"""Adjacent blocks are one copy: splits tables of block ids into runs that lie side by side in every table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...engine.kv_memory import KVMemory
from ...protocol.messages import Push


def runs(*tables: Sequence[int], max_length: int) -> Iterator[tuple[int, int]]:
    """(first index, length ≥ 1) of each run in which every table counts up by one."""
    total, start = len(tables[0]), 0
    while start < total:
        length = 1
        while (
            length < max_length
            and start + length < total
            and all(table[start + length] == table[start] + length for table in tables)
        ):
            length += 1
        yield start, length
        start += length


def run_length(push: Push, memory: KVMemory, max_bytes: int) -> int:
    """Blocks that may go in one run: neighbours only touch when all layers move."""
    return max(1, max_bytes // memory.block_bytes) if push.num_layers == memory.num_layers else 1


def run_view(memory: KVMemory, push: Push, first_block: int, length: int) -> memoryview:
    """The bytes of a run of `length` blocks of `memory`, in the layers of `push`."""
    if length == 1:
        return memory.block(first_block, push.first_layer, push.num_layers)
    start, stop = first_block * memory.block_bytes, (first_block + length) * memory.block_bytes
    return memory.buffer[start:stop]
