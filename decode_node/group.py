"""One attempt on the decode side: its choices, and the hand-off that may feed them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from ..core.errors import BadRequest, InternalError
from ..core.ids import AttemptKey, Ticket, WorkerKey
from ..engine.interface import EngineSpec
from ..engine.sequence import Sequence
from ..protocol.messages import Phases, StartDecode, unpack_ids
from ..worker.admission import cache_key, refuse


class GroupState(Enum):
    """RECEIVING → LIVE → ENDED; without a ticket a group starts LIVE."""

    RECEIVING = auto()
    LIVE = auto()
    ENDED = auto()


_NEXT = {
    GroupState.RECEIVING: {GroupState.LIVE, GroupState.ENDED},
    GroupState.LIVE: {GroupState.ENDED},
    GroupState.ENDED: set(),
}


@dataclass(slots=True, eq=False)
class Group:
    """`lead` owns the prompt's KV until the first tokens are there;

    `seqs` are the choices that still produce tokens.
    """

    key: AttemptKey
    lead: Sequence
    seqs: dict[int, Sequence]
    ticket: Ticket | None = None
    source: WorkerKey | None = None
    state: GroupState = GroupState.LIVE
    phases: Phases | None = None
    granted_at: float | None = None  # when the hand-off had room for all its blocks
    cancelled: set[int] = field(default_factory=set)

    def move(self, state: GroupState) -> None:
        """Change state; raises InternalError for a step that the life cycle does not have."""
        if state not in _NEXT[self.state]:
            raise InternalError(f"attempt {self.key}: {self.state.name} cannot become {state.name}")
        self.state = state


def build_group(key: AttemptKey, message: StartDecode, spec: EngineSpec, now: float) -> Group:
    """The group a StartDecode asks for; raises BadRequest when it can never run here."""
    prompt_ids, hash_key = unpack_ids(message.prompt_ids), cache_key(message.cache_salt, spec.fingerprint)
    seqs: dict[int, Sequence] = {}
    for choice in message.choices:
        output_ids = unpack_ids(choice.output_ids)
        reason = refuse(prompt_ids, output_ids, message.params, spec)
        if reason is not None:
            raise BadRequest(reason)
        if choice.choice in seqs or choice.choice >= message.params.n:
            raise BadRequest(f"choice {choice.choice} is named twice or not below n = {message.params.n}")
        seqs[choice.choice] = Sequence(
            key, choice.choice, list(prompt_ids), message.params, hash_key, now, now + message.timeout_s, output_ids
        )
    lead = seqs[min(seqs)]
    group = Group(key, lead, seqs)
    if message.ticket is not None:
        if message.prefill_worker is None or message.prefill_epoch is None:
            raise BadRequest("a ticket needs prefill_worker and prefill_epoch")
        if len(seqs) > 1 and any(s.output_ids for s in seqs.values()):
            raise BadRequest("several choices that have begun cannot share one hand-off")
        group.ticket, group.source = Ticket(message.ticket), WorkerKey(message.prefill_worker, message.prefill_epoch)
        group.state = GroupState.RECEIVING
    if not any(s.output_ids for s in seqs.values()):
        lead.sample_choices = tuple(sorted(seqs))
    return group
