"""I7: what a request gets does not depend on who runs beside it.

`FakeEngine`'s answer to a request alone is known without running it, so every run is compared with that (I2, I6). Where
nothing else can have gone wrong and the same request alone comes out right, it was the neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from .chaos import ChaosProfile
from .history import HistoryWriter
from .invariants import InvariantBroken
from .scenario import Outcome, Scenario, run_scenario

OF_CONTENT = {"I2", "I6"}


def run_scenario_beside_alone(
    scenario: Scenario, trace: Callable[[str], None] | None = None, history: HistoryWriter | None = None
) -> Outcome:
    """As `run_scenario`; in a run without faults, wrong content that no request has alone is called I7."""
    try:
        return run_scenario(scenario, trace, history)
    except InvariantBroken as broken:
        if scenario.profile != ChaosProfile() or broken.name not in OF_CONTENT or not _all_right_alone(scenario):
            raise
        text = re.sub(r"^I\d+ ", "", str(broken))
        raise InvariantBroken(f"I7 {text}, and alone every request comes out right") from broken


def _all_right_alone(scenario: Scenario) -> bool:
    try:
        for when, request in scenario.requests:
            run_scenario(replace(scenario, requests=((when, request),)))
    except InvariantBroken:
        return False
    return True
