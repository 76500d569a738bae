"""What a run amounts to: latencies, the share of requests inside their targets, prefix hits, errors of forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..core.quantiles import quantile
from .cluster import Journey


@dataclass(frozen=True, slots=True)
class Targets:
    """A request is good when it ends well within both. Seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Seconds. `goodput` is the good share of all requests; a failed one is never good. Errors are relative medians."""

    policy: str
    shape: str
    num_requests: int
    num_failed: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    goodput: float
    hit_rate: float  # of prompt tokens, found in the cache of the worker that computed the prompt
    local_rate: float  # of requests, prefilled where they decode
    duration_s: float
    ttft_forecast_error: float
    tpot_forecast_error: float
    num_role_changes: int = 0

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def summarize(policy: str, shape: str, journeys: Sequence[Journey], targets: Targets) -> Summary:
    """Of all journeys, each ended. Latencies are those of the answers that are whole."""
    whole = [journey for journey in journeys if not journey.error]
    ttft = [journey.ttft_s for journey in whole]
    tpot = [journey.tpot_s for journey in whole if journey.num_tokens > 1]
    good = sum(j.ttft_s <= targets.ttft_s and j.tpot_s <= targets.tpot_s for j in whole)
    prompt_tokens = sum(journey.request.num_prompt_tokens for journey in whole)
    return Summary(
        policy=policy,
        shape=shape,
        num_requests=len(journeys),
        num_failed=len(journeys) - len(whole),
        ttft_mean_s=mean(ttft),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p90_s=quantile(ttft, 0.9),
        ttft_p99_s=quantile(ttft, 0.99),
        tpot_mean_s=mean(tpot),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p99_s=quantile(tpot, 0.99),
        goodput=good / max(1, len(journeys)),
        hit_rate=sum(journey.num_cached for journey in whole) / max(1, prompt_tokens),
        local_rate=mean([float(j.decision is not None and j.decision.prefill is None) for j in whole]),
        duration_s=max((j.end_s or 0.0 for j in journeys), default=0.0),
        ttft_forecast_error=_error([(j.decision.ttft_s, j.ttft_s) for j in whole if j.decision]),
        tpot_forecast_error=_error([(j.decision.tpot_s, j.tpot_s) for j in whole if j.decision and j.num_tokens > 1]),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _error(pairs: list[tuple[float, float]]) -> float:
    return quantile([abs(foreseen - seen) / seen for foreseen, seen in pairs if seen > 0], 0.5)
