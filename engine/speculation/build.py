"""From a setting to what drafts."""

from __future__ import annotations

from collections.abc import Callable

from ...core.clock import Clock
from ...core.config import check_method
from ...core.errors import InternalError
from ..interface import Engine, EngineSpec
from .control import Speculator
from .draft_model import ModelProposer
from .interface import Proposer
from .ngram import NgramProposer
from .step_cost import StepCost
from .suffix import SuffixProposer


def build_speculation(
    method: str,
    max_tokens: int,
    spec: EngineSpec,
    open_draft: Callable[[str], Engine] | None = None,
    clock: Clock | None = None,
) -> Speculator | None:
    """What `method` names, for an engine of this `spec`; None for "off". Raises ConfigError for an unknown method.

    Where the engine's steps have not been measured, drafts are as long as they may be; "auto" then drafts nothing.
    `open_draft`: loads the draft model that "draft:MODEL" names. `clock`: see `Speculator`.
    """
    check_method(method)
    if method == "off" or (method == "auto" and spec.step_costs is None):
        return None
    cost = StepCost(spec.step_costs) if spec.step_costs is not None else None
    return Speculator(_proposers(method, spec, open_draft), max_tokens, cost, clock)


def _proposers(method: str, spec: EngineSpec, open_draft: Callable[[str], Engine] | None) -> list[Proposer]:
    kind, _, name = method.partition(":")
    match kind:
        case "ngram":
            return [NgramProposer()]
        case "draft":
            if open_draft is None:
                raise InternalError(f"speculation.method: {method} without anything that loads models")
            return [SuffixProposer(), ModelProposer(open_draft(name), spec)]
        case _:
            return [SuffixProposer()]
