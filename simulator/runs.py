"""One run for each policy and shape, and the names that the command line knows."""

from __future__ import annotations

from typing import get_args

from ..core.config import Disaggregate
from ..core.errors import ConfigError
from ..core.policy import PolicyName
from ..router.config import RouterConfig
from ..router.options import Chooser
from .cluster import FOREVER_S, Shape, TraceCluster
from .costs import WorkerCosts
from .reference import DynamoLinear, MooncakeShortestTtft, SglangThresholds
from .report import Summary, Targets, summarize
from .trace import TraceRequest

REFERENCES = ("sglang", "dynamo", "mooncake")
POLICIES: tuple[str, ...] = (*get_args(PolicyName), *REFERENCES)


def simulate(
    trace: list[TraceRequest],
    policy: str,
    shape: Shape,
    costs: WorkerCosts,
    targets: Targets,
    seed: int,
    slowdown: float = 1.0,
) -> Summary:
    """`slowdown`: of a prefill and a decode worker on the same cores, while both compute; 1: none share any.

    Raises ConfigError for a policy that does not exist or a request that no worker could hold.
    """
    longest = max(request.num_prompt_tokens + max(2048, request.num_output_tokens) for request in trace)
    if longest > costs.kv_tokens:
        raise ConfigError(f"trace: its longest request needs {longest} tokens, a worker holds {costs.kv_tokens}")
    cluster = TraceCluster(shape, costs, router_config(policy, targets), seed, _reference(policy, costs), slowdown)
    return summarize(policy, str(shape), cluster.run(trace), targets)


def router_config(policy: str, targets: Targets) -> RouterConfig:
    """The product's own settings, with times that end nothing and bounds that refuse nothing."""
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r}: choose from {', '.join(POLICIES)}")
    name: PolicyName = "kv-overlap" if policy in REFERENCES else policy  # type: ignore[assignment]
    disaggregate: Disaggregate = "auto"
    return RouterConfig(
        policy=name,
        disaggregate=disaggregate,
        target_ttft_s=targets.ttft_s,
        target_tpot_s=targets.tpot_s,
        max_queued_requests=1 << 20,
        max_active_requests=1 << 20,
        worker_timeout_s=10.0,
        unacknowledged_s=10.0,
        unavailable_s=FOREVER_S,
    )


def _reference(policy: str, costs: WorkerCosts) -> Chooser | None:
    match policy:
        case "sglang":
            return SglangThresholds()
        case "dynamo":
            return DynamoLinear()
        case "mooncake":
            return MooncakeShortestTtft(costs)
    return None
