"""From a setting to what drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...core.clock import Clock
from ...core.config import check_method
from ...core.errors import ConfigError, InternalError
from ..interface import Engine, EngineSpec
from .control import Speculator
from .draft_model import ModelProposer
from .interface import Proposer
from .ngram import NgramProposer
from .step_cost import StepCost
from .suffix import SuffixProposer


@dataclass(frozen=True, slots=True)
class Openers:
    """What loads models. draft: that of "draft:MODEL". head: that of "eagle:PATH", or for None the one that comes with
    the project for this model, which may be none.
    """

    draft: Callable[[str], Engine] | None = None
    head: Callable[[str | None], Proposer | None] | None = None


def build_speculation(
    method: str, max_tokens: int, spec: EngineSpec, openers: Openers = Openers(), clock: Clock | None = None
) -> Speculator | None:
    """What `method` names, for an engine of this `spec`; None for "off". Raises ConfigError for an unknown method.

    Where the engine's steps have not been measured, drafts are as long as they may be; "auto" then drafts nothing.
    `clock`: see `Speculator`.
    """
    check_method(method)
    if method == "off" or (method == "auto" and spec.step_costs is None):
        return None
    cost = StepCost(spec.step_costs) if spec.step_costs is not None else None
    proposers = _proposers(method, spec, openers)
    return Speculator(proposers, max_tokens, cost, clock, takes_trees=spec.takes_trees)


def _proposers(method: str, spec: EngineSpec, openers: Openers) -> list[Proposer]:
    kind, _, name = method.partition(":")
    match kind:
        case "ngram":
            return [NgramProposer()]
        case "suffix":
            return [SuffixProposer()]
        case "draft" if openers.draft is not None:
            return [SuffixProposer(), ModelProposer(openers.draft(name), spec)]
        case "eagle" if openers.head is not None:
            return [_needed(openers.head(name or None))]
        case "auto":
            head = openers.head(None) if openers.head is not None else None
            return [SuffixProposer(), *([head] if head is not None else [])]
        case _:
            raise InternalError(f"speculation.method: {method} without anything that loads models")


def _needed(head: Proposer | None) -> Proposer:
    if head is None:
        raise ConfigError(
            "speculation.method: eagle: no draft head comes with the project for this model; train one with "
            "`penstock train-draft MODEL` and name its file: eagle:PATH"
        )
    return head
