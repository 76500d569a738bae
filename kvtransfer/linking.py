"""Which of two workers opens the link between them."""

from __future__ import annotations

from ..protocol.messages import Peer, Role

SOURCE_ROLES: frozenset[Role] = frozenset({"prefill", "both"})
DESTINATION_ROLES: frozenset[Role] = frozenset({"decode", "both"})


def dials(role: Role, worker_id: str, peer: Peer) -> bool:
    """Decode dials prefill; of two workers with both roles the one with the smaller id dials."""
    if role not in DESTINATION_ROLES or peer.role not in SOURCE_ROLES or worker_id == peer.worker_id:
        return False
    both_could = role in SOURCE_ROLES and peer.role in DESTINATION_ROLES
    return not both_could or worker_id < peer.worker_id
