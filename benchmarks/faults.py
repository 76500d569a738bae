"""What a cluster of real processes survives: `python benchmarks/faults.py [--moments 100] [--streams 32]`.

2 prefill and 2 decode workers with the real model, in float32 or (`--dtype auto`) as it is served by default, under
streams that are kept going: as one ends the next begins. At each moment one worker, prefill or decode, is killed
(SIGKILL), frozen (SIGSTOP, SIGCONT after 2 to 4 s) or loses all its hand-off links; each fault is seen to have happened
before it counts. Then:

    errors            streams that ended with an error or not at all                                     must be 0
    exact             answers equal to the undisturbed run: text, tokens, finish, logprobs within 1e-3   must be all
    resume gap        longest wait between two tokens of a resumed stream around the fault; the first stage of the
                      killed worker's restart (loading the model) goes on beside it on the same cores
    noticed           fault → the router's log says that the worker is lost
    no stranded block fault → no survivor holds blocks beyond those of the attempts wanted there
    leaks             descriptors, sockets, mapped pools and threads of every process, and /dev/shm: before and after

The client runs on the same cores. A link loss is asked of the worker itself (PENSTOCK_TEST_HOOKS=1, SIGUSR2): the links
of one host are Unix sockets, which nothing outside can break.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from tempfile import NamedTemporaryFile
from typing import Any

from penstock.benchmarks.quick import RESULTS, commit, machine
from penstock.testing.fault_run import (
    ENVIRONMENT,
    FaultPlan,
    FaultResult,
    Moment,
    resume_gaps,
    run_faults,
    wrong_answers,
)
from penstock.testing.process_faults import FaultKind
from penstock.testing.serving import serving

# Steps that last no longer than a reader would wait: on a few cores a prompt of 1,000 tokens in one step takes seconds.
TOPOLOGY = """
model: { dtype: DTYPE }
prefill: { replicas: 2, kv_cache_bytes: 536870912, max_num_batched_tokens: 128 }
decode: { replicas: 2, kv_cache_bytes: 536870912, max_num_batched_tokens: 128 }
"""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum of some seconds."""
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    at_99 = ordered[min(len(ordered) - 1, -(-99 * len(ordered) // 100) - 1)]
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(at_99, 3),
        "max": round(ordered[-1], 3),
        "n": len(ordered),
    }


def figures(result: FaultResult) -> dict[str, Any]:
    gaps = resume_gaps(result)
    errors = [record.error for record in result.records if record.error]
    wrong = wrong_answers(result)
    return {
        "faults": {str(kind): len(_of(result, kind)) for kind in FaultKind},
        "victims": {
            role: sum(m.struck.victim.startswith(role) for m in result.moments) for role in ("prefill", "decode")
        },
        "streams": len(result.records),
        "streams_at_a_fault": spread([moment.live_streams for moment in result.moments]),
        "errors": len(errors),
        "first_errors": errors[:5],
        "exact": len(result.records) - len(errors) - len({line.split(",")[0] for line in wrong}),
        "first_wrong": wrong[:5],
        "resumed": sum(record.resumed for record in result.records),
        "retried_before_the_first_token": sum(r.attempts - 1 - r.resumed for r in result.records if r.attempts),
        "resume_gap_s": spread([gap for gap, _ in gaps]),
        "resume_gap_s_by_kind": {
            str(kind): spread([gap for gap, moment in gaps if moment.struck.kind is kind]) for kind in FaultKind
        },
        "calm_gap_s": spread(result.calm_gaps),
        "noticed_s": {
            str(kind): spread([m.noticed_s for m in _of(result, kind) if m.noticed_s is not None])
            for kind in (FaultKind.KILL, FaultKind.FREEZE)
        },
        "never_noticed": sum(m.noticed_s is None for m in result.moments if m.struck.kind is not FaultKind.LINK),
        "false_alarms": result.times_lost - sum(m.noticed_s is not None for m in result.moments),
        "no_stranded_block_s": spread([m.unstranded_s for m in result.moments if m.unstranded_s is not None]),
        "stranded_for_good": sum(m.unstranded_s is None for m in result.moments),
        "whole_again_s": {
            str(kind): spread([m.recovered_s for m in _of(result, kind) if m.recovered_s is not None])
            for kind in FaultKind
        },
        "leaks": result.leaks,
        "shared_memory_left": result.shared_memory_left,
        "seconds": round(result.seconds, 1),
    }


def _of(result: FaultResult, kind: FaultKind) -> list[Moment]:
    return [moment for moment in result.moments if moment.struck.kind is kind]


def is_flawless(found: dict[str, Any]) -> bool:
    """What must hold whatever the machine is: no error, every answer exact, nothing stranded or leaked."""
    nothing = ("errors", "never_noticed", "stranded_for_good", "leaks", "shared_memory_left")
    return not any(found[name] for name in nothing) and found["exact"] == found["streams"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=100, help="faults (default 100)")
    parser.add_argument("--streams", type=int, default=32, help="streams at all times (default 32)")
    parser.add_argument("--max-tokens", type=int, default=24, help="longest answer (default 24)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts, moments and victims (default 1)")
    parser.add_argument("--dtype", default="float32", help="model.dtype of the workers (default float32)")
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results/")
    args = parser.parse_args()
    topology = TOPOLOGY.replace("DTYPE", args.dtype)
    plan = FaultPlan(args.moments, args.streams, args.seed, args.max_tokens)
    load = os.getloadavg()
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(topology)
        file.flush()
        with serving("--topology", file.name, environment=ENVIRONMENT) as cluster:
            result = run_faults(cluster, plan, lambda line: print(line, file=sys.stderr, flush=True))
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine() | {"load_before": [round(value, 1) for value in load]},
        "topology": topology,
        "options": sys.argv[1:],
        "results": figures(result),
    }
    print(json.dumps(record, indent=1))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{record['commit']}-faults-{args.dtype}-{record['machine']['cores']}core.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}", file=sys.stderr)
    return 0 if is_flawless(record["results"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
