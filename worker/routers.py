"""The routers that a worker serves. They know nothing of each other: each has its own requests, commands and books.

A router is known by its name, which stays when it is started again; its epoch does not. A new epoch of one name voids
what the old one has asked for, and nothing of any other router.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.ids import WorkerKey
from ..protocol.messages import FromRouter, OthersLoad, Peer

MAX_ROUTERS = 8
ROUTER_GONE_S = 2.0  # without a connection; its requests have failed or ended by then
Tallies = dict[str, "Tally"]  # router → what its attempts take


@dataclass(frozen=True, slots=True)
class RouterGone:
    """The connection to a router has been down for ROUTER_GONE_S: nobody waits for what it has asked for."""

    router: str


@dataclass(slots=True)
class Tally:
    """What attempts take on this worker; see `OthersLoad`."""

    attempts: int = 0
    blocks: int = 0
    streams: int = 0
    running: int = 0
    queued_tokens: int = 0


@dataclass(slots=True)
class _Known:
    epoch: str
    handled: int = 0  # the highest number of its commands
    peers: tuple[Peer, ...] = ()


@dataclass(slots=True)
class Routers:
    """Those that have spoken, the one whose list of peers is the newest last."""

    _known: dict[str, _Known] = field(default_factory=dict)

    def hear(self, frame: FromRouter) -> bool:
        """Note a command. Whether the router of that name was another incarnation until now."""
        before = self._known.get(frame.router)
        if before is not None and before.epoch == frame.router_epoch:
            before.handled = max(before.handled, frame.number)
            return False
        # The old incarnation's peers stay until the new one says who is there: links need not be made anew.
        peers = before.peers if before is not None else ()
        self._known[frame.router] = _Known(frame.router_epoch, frame.number, peers)
        return before is not None

    def forget(self, router: str) -> bool:
        """It is gone. Whether it was there."""
        return self._known.pop(router, None) is not None

    @property
    def epochs(self) -> dict[str, str]:
        """Name → the incarnation that counts."""
        return {name: known.epoch for name, known in self._known.items()}

    @property
    def handled(self) -> dict[str, tuple[str, int]]:
        """Name → incarnation, and the highest number of its commands."""
        return {name: (known.epoch, known.handled) for name, known in self._known.items()}

    def set_peers(self, router: str, peers: list[Peer]) -> tuple[Peer, ...]:
        """What this router says of the other workers; returns what all say together."""
        known = self._known.pop(router)
        known.peers = tuple(peers)
        self._known[router] = known
        return self.peers()

    def peers(self) -> tuple[Peer, ...]:
        """Every incarnation that some router takes for live, as the newest list that names it says."""
        found: dict[WorkerKey, Peer] = {}
        for known in self._known.values():
            found.update({WorkerKey(peer.worker_id, peer.epoch): peer for peer in known.peers})
        return tuple(found.values())


def others_load(tallies: Tallies, router: str) -> OthersLoad | None:
    """What all but `router` take together; None for nothing."""
    others = [tally for name, tally in tallies.items() if name != router]
    if not any(tally.attempts for tally in others):
        return None
    return OthersLoad(
        attempts=sum(tally.attempts for tally in others),
        blocks=sum(tally.blocks for tally in others),
        streams=sum(tally.streams for tally in others),
        running=sum(tally.running for tally in others),
        queued_tokens=sum(tally.queued_tokens for tally in others),
    )


def tally_of(tallies: Tallies, router: str) -> Tally:
    """The entry of `router`, made when absent."""
    return tallies.setdefault(router, Tally())


def blocks_to_go_on(lengths: Iterable[int], num_prompt_tokens: int, block_size: int) -> int:
    """Blocks that sequences of one prompt need for their next tokens, full prompt blocks shared. `lengths`: tokens of
    each so far.
    """
    shared = num_prompt_tokens // block_size
    return shared + sum(length // block_size + 1 - shared for length in lengths)
