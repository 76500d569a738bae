"""`penstock router`: the router and the HTTP gateway, together in one process and one event loop.

    HTTP ─▶ gateway ─▶ RouterService ─zmq─▶ workers            stdout ─▶ supervisor: what is ready (deploy/reports.py)
                                                               stdin ◀─ supervisor: which worker's process has ended

Start: read the tokenizer, bind the router's socket, bind the port. End: SIGTERM refuses what is new, lets running
requests finish (`gateway.drain_s`), then closes both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

from ..core.clock import MonotonicClock
from ..core.cluster_key import cluster_key
from ..core.config import Topology, read_api_keys
from ..core.errors import ConfigError, ModelFileError
from ..core.ids import MAIN_ROUTER, SecureIds
from ..gateway.app import create_app
from ..gateway.config import GatewayConfig, Limits
from ..gateway.server import ServeOptions, serve
from ..models.config import config_from_gguf, config_from_hf
from ..models.gguf import read_gguf
from ..models.tokenizer import load_tokenizer
from ..router.config import RouterConfig
from ..router.interface import ClusterStatus
from ..router.service import RouterService
from .child import is_supervised
from .reports import ClusterReady, Listening, Report, WorkerChanged, encode_report, parse_exited

REPORT_S = 0.25  # as often as workers speak up

_log = logging.getLogger(__name__)


def main(topology: Topology, router: str = MAIN_ROUTER) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. `router`: its name among those on the same workers."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(run_front(topology, sys.stdout, router))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where uvloop is installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:  # not made for this system
        return None
    return uvloop.new_event_loop


async def run_front(topology: Topology, reports: TextIO, router: str = MAIN_ROUTER) -> None:
    """Router and gateway until a signal. Raises ConfigError when the port cannot be bound."""
    address = topology.address_of(router)
    clock, ids = MonotonicClock(), SecureIds()
    tokenizer = load_tokenizer(Path(topology.model.source))
    gateway = topology.gateway
    options = ServeOptions(gateway.host, gateway.port, grace_s=gateway.drain_s)
    service = RouterService(router_config(topology), address, clock=clock, ids=ids, cluster_key=cluster_key(topology))
    await service.start()
    try:
        app = create_app(gateway_config(topology), service, tokenizer, clock, ids)
        async with asyncio.TaskGroup() as group:
            side_tasks = [
                group.create_task(service.wait()),
                group.create_task(_report_changes(service, topology, reports)),
            ]
            if is_supervised():
                side_tasks.append(group.create_task(_hear_supervisor(service)))
            await serve(app, options, on_bound=partial(_report_port, gateway.host, reports))
            for task in side_tasks:
                task.cancel()
    except* OSError as failures:
        raise ConfigError(f"cannot listen on {gateway.host}:{gateway.port}: {failures.exceptions[0]}") from failures
    finally:
        await service.stop()
        _remove_socket(address)


def _remove_socket(address: str) -> None:
    """ZeroMQ may leave the file of its Unix socket when the process ends at once."""
    Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def router_config(topology: Topology) -> RouterConfig:
    router = topology.router
    return RouterConfig(
        policy=router.policy,
        disaggregate=router.disaggregate,
        local_prefill_max_tokens=router.local_prefill_max_tokens,
        max_queued_requests=router.max_queued_requests,
        max_active_requests=router.max_active_requests,
        max_exact_blocks=router.max_exact_blocks if router.exact_index else 0,
        worker_timeout_s=router.worker_timeout_s,
        max_attempts=router.max_attempts,
        unavailable_s=router.unavailable_s,
        target_ttft_s=router.target_ttft_s,
        target_tpot_s=router.target_tpot_s,
        classes=router.classes,
        default_class=router.default_class,
        refuse_late=router.refuse_late,
        max_queued_tokens=router.max_queued_tokens,
        max_promised_blocks=router.max_promised_blocks,
        canary=router.canary,
        canary_idle_s=router.canary_idle_s,
        balance_roles=router.balance_roles,
        min_prefill=router.min_prefill,
        min_decode=router.min_decode,
        max_worker_streams=topology.decode.max_num_seqs,
        expected_workers=len(topology.workers()),
        fixed_roles="the workers share one pool (transfer.one_pool)" if topology.transfer.one_pool else "",
    )


def gateway_config(topology: Topology) -> GatewayConfig:
    """What the gateway needs of the topology. Raises ConfigError for a bad key file, ModelFileError for a bad model."""
    gateway, model = topology.gateway, topology.model
    window = model_window(Path(model.source))
    return GatewayConfig(
        model_name=model.served_name,
        max_model_len=min(window, model.max_model_len or window),
        api_keys=read_api_keys(gateway),
        timeout_s=gateway.timeout_s,
        limits=Limits(max_body_bytes=gateway.max_body_bytes),
    )


def model_window(path: Path) -> int:
    """The longest sequence, in tokens, that the model at `path` was made for. Reads headers only, without torch."""
    if path.suffix == ".gguf":
        return config_from_gguf(read_gguf(path).metadata, source=path.name).max_position
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ModelFileError(f"{file}: {err}") from err
    return config_from_hf(values, str(file)).max_position


class StatusDiff:
    """Turns the router's status, looked at again and again, into what has changed since."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._known: dict[str, WorkerChanged] = {}
        self._was_ready = False

    def changes(self, status: ClusterStatus) -> list[Report]:
        found: list[Report] = []
        for worker in status.workers:
            facts = WorkerChanged(
                worker_id=worker.worker_id,
                role=worker.role,
                pid=worker.pid,
                epoch=worker.epoch,
                state=worker.state,
                total_blocks=worker.total_blocks,
                dtype=worker.dtype,
                links=worker.transports,
            )
            if self._known.get(worker.worker_id) != facts:
                self._known[worker.worker_id] = facts
                found.append(facts)
        if status.ready and not self._was_ready:
            found.append(self._ready(status))
        self._was_ready = status.ready
        return found

    def _ready(self, status: ClusterStatus) -> ClusterReady:
        name = self._topology.model.served_name
        return ClusterReady(name, self._topology.block_size, status.bytes_per_token, status.max_sequence_tokens)


async def _report_changes(service: RouterService, topology: Topology, reports: TextIO) -> None:
    diff = StatusDiff(topology)
    while True:
        for report in diff.changes(service.status()):
            _report(report, reports)
        await asyncio.sleep(REPORT_S)


def _report_port(host: str, reports: TextIO, port: int) -> None:
    _report(Listening(host, port), reports)


def _report(report: Report, reports: TextIO) -> None:
    reports.write(encode_report(report) + "\n")
    reports.flush()


async def _hear_supervisor(service: RouterService) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        exited = parse_exited(line.decode(errors="replace"))
        if exited is None:
            _log.warning("the supervisor sent a line that is not `exited NAME PID`: %r", line[:200])
        else:
            worker_id, pid = exited
            service.worker_exited(worker_id, pid=pid)
