"""What a source has said of the blocks it pushed, so that Done can say it once more for each block as a whole."""

from __future__ import annotations

import msgspec

from ..core.ids import Ticket
from ..protocol.messages import Done, Push
from .acceptance import Pieces, digest_at
from .digest import combined_digest


class Vouchers:
    """The digests of all pushes of the live tickets of one link. One thread owns it."""

    def __init__(self) -> None:
        self._pieces: dict[Ticket, dict[int, Pieces]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def note(self, push: Push) -> None:
        """This push is on its way."""
        pieces = self._pieces.setdefault(Ticket(push.ticket), {})
        for at, ordinal in enumerate(push.ordinals):
            pieces.setdefault(ordinal, []).append((push.first_layer, push.num_layers, digest_at(push, at)))

    def complete(self, done: Done) -> Done:
        """`done` with the digest of every block that was pushed, in the order of ordinals."""
        pieces = self._pieces.get(Ticket(done.ticket), {})
        digests = b"".join(combined_digest(pieces[ordinal]) for ordinal in sorted(pieces))
        return msgspec.structs.replace(done, digests=digests)

    def forget(self, ticket: Ticket) -> None:
        self._pieces.pop(ticket, None)
