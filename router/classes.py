"""What a request is promised: the class it belongs to, that class's share, and the targets that hold for it.

A request names its class, or gives a priority: the lower, the sooner, 0 for the default class. Each step up or down is
one place in the list of classes, which begins with the most urgent; beyond its ends there is nothing more urgent, or
less.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import ClassConfig
from ..core.errors import BadRequest
from .config import RouterConfig
from .fair_queue import Flow
from .interface import GenerateRequest

MAX_TARGET_S = 86_400.0
MIN_TARGET_S = 1e-4
MAX_TENANT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Promise:
    """Seconds. A target of None: it is not refused for that. `order_s`: who is due first goes first within a flow."""

    flow: Flow
    weight: float
    ttft_s: float | None
    tpot_s: float | None
    shared_tpot_s: float | None  # the class's own word: others on its worker keep it too
    order_s: float


UNPROMISED = Promise(Flow("", ""), 1.0, None, None, None, 0.0)


class Classes:
    """Resolves what requests say. Raises BadRequest that names the field."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._names = [one.name for one in config.classes]

    @property
    def names(self) -> list[str]:
        return self._names

    def promise(self, request: GenerateRequest) -> Promise:
        check_targets(request)
        found = self._find(request)
        ttft_s, tpot_s = self._targets(found)
        own_ttft_s, own_tpot_s = request.target_ttft_s, request.target_tpot_s
        can_refuse = self._config.refuse_late != "never"
        return Promise(
            Flow(found.name, request.tenant),
            found.weight,
            (own_ttft_s or ttft_s) if can_refuse else None,
            (own_tpot_s or tpot_s) if can_refuse else None,
            tpot_s if can_refuse else None,
            own_ttft_s or ttft_s or self._config.target_ttft_s,
        )

    def _targets(self, found: ClassConfig) -> tuple[float | None, float | None]:
        if self._config.refuse_late != "always":
            return found.target_ttft_s, found.target_tpot_s
        return found.target_ttft_s or self._config.target_ttft_s, found.target_tpot_s or self._config.target_tpot_s

    def _find(self, request: GenerateRequest) -> ClassConfig:
        name = request.class_name
        if name and name not in self._names:
            raise BadRequest(f"class: {name[:64]!r} is not one of {', '.join(self._names)}", "class")
        if name:
            return self._config.classes[self._names.index(name)]
        place = self._names.index(self._config.default_class) + request.priority
        return self._config.classes[min(max(0, place), len(self._names) - 1)]


def check_targets(request: GenerateRequest) -> None:
    """Raises BadRequest for a target or tenant out of bounds."""
    if len(request.tenant) > MAX_TENANT_CHARS:
        raise BadRequest(f"tenant: {len(request.tenant)} characters, give at most {MAX_TENANT_CHARS}", "tenant")
    for name, value in (("target_ttft_s", request.target_ttft_s), ("target_tpot_s", request.target_tpot_s)):
        if value is not None and not MIN_TARGET_S <= value <= MAX_TARGET_S:
            raise BadRequest(f"{name}: {value}, give a number from {MIN_TARGET_S:g} to {MAX_TARGET_S:g}", name)
