"""From a setting to what drafts."""

from __future__ import annotations

from ...core.config import DRAFT_METHODS
from ...core.errors import ConfigError
from ..interface import EngineSpec
from .control import Speculator
from .interface import Proposer
from .ngram import NgramProposer
from .step_cost import StepCost
from .suffix import SuffixProposer


def build_speculation(method: str, max_tokens: int, spec: EngineSpec) -> Speculator | None:
    """What `method` names, for an engine of this `spec`; None for "off". Raises ConfigError for an unknown method.

    Where the engine's steps have not been measured, drafts are as long as they may be; "auto" then drafts nothing.
    """
    if method == "off" or (method == "auto" and spec.step_costs is None):
        return None
    cost = StepCost(spec.step_costs) if spec.step_costs is not None else None
    return Speculator(_proposers(method), max_tokens, cost)


def _proposers(method: str) -> list[Proposer]:
    match method:
        case "ngram":
            return [NgramProposer()]
        case "auto" | "suffix":
            return [SuffixProposer()]
        case _:
            raise ConfigError(f"speculation.method: {method!r} is not one of {', '.join(DRAFT_METHODS)}")
