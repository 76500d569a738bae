"""How urgent a client says its request is: its class, and its own targets.

The class is what the first of these says that is there: the header X-Penstock-Class (a name), `priority` in the body
(as with vLLM: lower is sooner, 0 is the default class, each step is one class), `service_tier` in the body (OpenAI's:
`priority` is the most urgent class, `flex` the least, the others the default). Targets are headers, in seconds. Whether
the router has a class of that name is the router's to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.errors import BadRequest
from .bodies import SamplingFields, shorten
from .call import CLASS_HEADER, TPOT_HEADER, TTFT_HEADER, Call

MAX_STEPS = 1 << 10  # more than there can be classes
MAX_TARGET_S = 86_400.0
MIN_TARGET_S = 1e-4
_TIERS = {"priority": -MAX_STEPS, "flex": MAX_STEPS}


@dataclass(frozen=True, slots=True)
class Urgency:
    """As the router's GenerateRequest has it."""

    class_name: str = ""
    priority: int = 0
    target_ttft_s: float | None = None
    target_tpot_s: float | None = None


def urgency_of(call: Call, body: SamplingFields) -> Urgency:
    """Raises BadRequest that names the header."""
    if len(call.class_name) > 64:
        raise BadRequest(f"{CLASS_HEADER}: {len(call.class_name)} characters, give the name of a class", CLASS_HEADER)
    steps = body.priority if body.priority is not None else _TIERS.get(body.service_tier or "", 0)
    return Urgency(
        call.class_name,
        min(MAX_STEPS, max(-MAX_STEPS, steps)),
        _seconds(TTFT_HEADER, call.ttft_target),
        _seconds(TPOT_HEADER, call.tpot_target),
    )


def _seconds(header: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MIN_TARGET_S <= value <= MAX_TARGET_S:  # not a number compares as outside
        raise BadRequest(
            f"{header}: {shorten(text)}, give seconds from {MIN_TARGET_S:g} to {MAX_TARGET_S:g}, such as 0.5", header
        )
    return value
