"""One run for each policy and shape, and the names that the command line knows."""

from __future__ import annotations

from dataclasses import replace
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
    *,
    balance_roles: bool = False,
) -> Summary:
    """`slowdown`: of a prefill and a decode worker on the same cores, while both compute; 1: none share any.

    Raises ConfigError for a policy that does not exist or a request that no worker could hold.
    """
    return simulate_parts(trace, policy, shape, costs, targets, seed, 1, slowdown, balance_roles=balance_roles)[0]


def simulate_parts(
    trace: list[TraceRequest],
    policy: str,
    shape: Shape,
    costs: WorkerCosts,
    targets: Targets,
    seed: int,
    num_parts: int,
    slowdown: float = 1.0,
    *,
    balance_roles: bool = False,
) -> list[Summary]:
    """One run; a row for all, and with several parts of the same length, one for the requests that come in each."""
    longest = max(request.num_prompt_tokens + max(2048, request.num_output_tokens) for request in trace)
    if longest > costs.kv_tokens:
        raise ConfigError(f"trace: its longest request needs {longest} tokens, a worker holds {costs.kv_tokens}")
    config = replace(router_config(policy, targets), balance_roles=balance_roles, max_worker_streams=costs.max_streams)
    cluster = TraceCluster(shape, costs, config, seed, _reference(policy, costs), slowdown)
    name = f"{shape} balanced" if balance_roles else str(shape)
    journeys = cluster.run(trace)
    rows = [summarize(policy, name, journeys, targets)]
    part_s = (trace[-1].arrival_s + 1e-9) / num_parts
    for part in range(num_parts if num_parts > 1 else 0):
        own = [journey for journey in journeys if part <= journey.request.arrival_s / part_s < part + 1]
        rows.append(summarize(policy, f"{name}, part {part + 1}", own, targets))
    return [replace(row, num_role_changes=len(cluster.role_changes)) for row in rows]


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
