"""The seam between the hand-off machines and whatever moves bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..core.ids import WorkerKey
from ..protocol.messages import Peer, Role
from .effects import LinkEffect, LinkEvent

OnEvent = Callable[[LinkEvent], None]


class Mesh(Protocol):
    """All hand-off links of one worker. Calls never block; everything that happens is reported through `OnEvent`.

    Events come in order for each peer, on any thread, also from within `perform`: `OnEvent` must only queue. After
    PeerLost no event of that link follows; when the two meet again, PeerUp begins anew and nothing of the old link is
    kept. An effect for a peer without a link is dropped: its PeerLost has been or is about to be reported.
    """

    @property
    def address(self) -> str:
        """Where other workers reach this one; goes into Hello."""
        ...

    @property
    def transports(self) -> list[str]: ...

    def set_peers(self, peers: list[Peer]) -> None:
        """The workers now known. Decode opens the links to prefill; links to workers no longer listed end."""
        ...

    def set_role(self, role: Role) -> None:
        """This worker is for something else now. Its links stay; the next `set_peers` adds those that it lacks."""
        ...

    def perform(self, effect: LinkEffect) -> None: ...

    def linked(self) -> list[tuple[WorkerKey, str]]:
        """Peers with a live link, and the transport to each."""
        ...

    def drop_links(self) -> None:
        """Break every live link as if the network had, for tests of what follows. Any thread."""
        ...

    def close(self) -> None: ...
