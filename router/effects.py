"""What the router core asks of its shell: put a command on the wire, or tell the caller of a request something."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.ids import WorkerKey
from ..protocol.messages import FromRouter
from .interface import EndEvent, TokensEvent


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to this incarnation; it may get lost on the way, the core notices."""

    worker: WorkerKey
    message: FromRouter


@dataclass(frozen=True, slots=True)
class Deliver:
    request_id: str
    event: TokensEvent


@dataclass(frozen=True, slots=True)
class End:
    """The last effect that names this request, exactly once."""

    request_id: str
    event: EndEvent


Effect = Send | Deliver | End
