"""Bugs of speculation: what is verified, kept and rolled back."""

from __future__ import annotations

from typing import Any

from ...decode_node.drafting import Drafting
from ...decode_node.role import DecodeRole
from ...decode_node.scheduler import DecodeScheduler
from ...protocol.messages import SampledToken
from ..fake_engine import FakeEngine
from .bug import Bug, Seeds, plants
from .handoffs import ANY, CALM


def keep_rejected(original: Any) -> Any:
    """The cache of a rejected token counts as that of the one drawn in its place, which so is never computed."""

    def advance(self: DecodeScheduler, entry: Any, num_accepted: int = 0) -> None:
        original(self, entry, num_accepted + int(num_accepted < len(entry.draft)))

    return advance


def emit_drafted(original: Any) -> Any:
    """Drafted tokens reach the client before they are verified."""

    def accept(self: DecodeRole, group: Any, seq: Any, tokens: Any, now: float, entry: Any = None) -> None:
        if entry is not None and len(entry.draft) >= len(tokens):
            tokens = (*tokens[:-1], SampledToken(entry.draft[len(tokens) - 1]))
        original(self, group, seq, tokens, now, entry)

    return accept


def draw_at_one_index(original: Any) -> Any:
    """All rows of a draft are drawn as if they were the first."""

    def drawn(self: FakeEngine, entry: Any, choice: int, path: Any) -> SampledToken:
        token: SampledToken = original(self, entry, choice, path)
        return original(self, entry, choice, ()) if path and not entry.seq.params.is_greedy else token

    return drawn


def keep_draft_blocks(original: Any) -> Any:
    """Blocks of rejected tokens leave the table and never come back to the pool."""

    def settle(self: Drafting, entry: Any, num_accepted: int) -> None:
        table = entry.seq.block_table
        held = list(table)
        original(self, entry, num_accepted)
        dropped = held[len(table) :]
        if dropped:
            self._pool.allocate(len(dropped))

    return settle


def leave_path(original: Any) -> Any:
    """What was accepted of a tree stays where it was computed."""
    return lambda self, entry, path: None


def see_sibling(original: Any) -> Any:
    """A drafted token sees the one before it in the draft, on its path or not."""

    def seen(self: FakeEngine, entry: Any, layer: int, path: Any) -> bytes:
        if entry.parents and path and path[-1] > 0 and path[-1] - 1 not in path:
            return bytes(original(self, entry, layer, (*path[:-1], path[-1] - 1, path[-1])))
        return bytes(original(self, entry, layer, path))

    return seen


def remember_ended(original: Any) -> Any:
    return lambda self, seq: None


DRAFT_BUGS = [
    Bug(
        "keep-rejected",
        "of our own",
        "a rejected token is not rolled back in the cache",
        plants((DecodeScheduler, "advance", keep_rejected)),
        Seeds("I1", ANY),
    ),
    Bug(
        "emit-drafted",
        "of our own",
        "a token reaches the client that was drafted and not drawn",
        plants((DecodeRole, "_accept", emit_drafted)),
        Seeds("I2", CALM),
    ),
    Bug(
        "draft-index",
        "of our own",
        "the tokens of a draft are all drawn with the random numbers of its first",
        plants((FakeEngine, "_drawn", draw_at_one_index)),
        Seeds("I2", CALM),
    ),
    Bug(
        "draft-blocks",
        "of our own",
        "blocks of rejected tokens are never free again",
        plants((Drafting, "settle", keep_draft_blocks)),
        Seeds("I4", ANY),
    ),
    Bug(
        "draft-path",
        "of our own",
        "the accepted tokens of a tree stay in the slots of the tree, among rejected ones",
        plants((FakeEngine, "_keep", leave_path)),
        Seeds("I2", CALM),
    ),
    Bug(
        "draft-sibling",
        "of our own",
        "a token of a tree attends to one that is not on its path",
        plants((FakeEngine, "_seen", see_sibling)),
        Seeds("I2", CALM),
    ),
    Bug(
        "draft-memory",
        "of our own",
        "what is remembered of a sequence to draft for it stays when it has ended",
        plants((Drafting, "forget", remember_ended)),
        Seeds("I8", ANY),
    ),
]
