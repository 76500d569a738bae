"""A real worker process around an engine of arithmetic, for the fault matrix: real sockets, threads and signals.

    python -m penstock.testing.stub_worker '{"name": "decode-0", "role": "decode", …}'        fields: StubConfig

At the moment that a request's id names (`victim/MID_TRANSFER/3`) the worker writes a line of JSON to its stdout and
waits a little, so that whoever reads it can strike while the worker is there. It hears commands on its stdin, one a
line: `fail-step`, `step-clock SECONDS`, `read-clock`, `eat-memory MEBIBYTES`. It ends when its stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from ..core.clock import Clock, MonotonicClock
from ..core.ids import SecureIds, Ticket, WorkerKey, new_epoch
from ..decode_node.role import DecodeRole
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine, OnLayers, ScheduledSeq
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.effects import LinkEvent, MessageArrived, SendBlocks, SendMessage
from ..kvtransfer.link import OnEvent
from ..kvtransfer.mesh import MeshSettings, SocketMesh
from ..kvtransfer.socket_link import LinkTimes
from ..kvtransfer.source import PushSizes, SourceTable
from ..kvtransfer.transports.address import KvAddress
from ..prefill_node.role import PrefillRole
from ..protocol.messages import (
    Ack,
    Done,
    FromRouter,
    Grant,
    Offer,
    Output,
    Role,
    SampledToken,
    StartDecode,
    StartPrefill,
)
from ..worker.core import CoreEffect, WorkerCore
from ..worker.process import run_worker
from ..worker.role import Tell
from ..worker.router_links import Incarnation
from ..worker.turn_watch import TurnWatch
from .fault_clock import SteppedWallClock
from .fault_cluster import Batch, FaultEngine, full_disk
from .fault_moments import MID_STREAM_INDEX, Moment

HOLD_S = 0.25  # how long a worker waits at a moment
QUEUED_ON_DECODE_S = 0.08  # an offer that is not granted by then waits for room


class StubConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the driver says on the command line. `kv_port`: where the proxy in front of this worker listens."""

    name: str
    role: Role
    router_address: str
    runtime_dir: str
    cluster_key: str  # hex
    kv_port: int
    step_s: float = 0.02
    hold_s: float = HOLD_S
    lease_s: float = 2.0
    num_blocks: int = 32
    max_batch_tokens: int = 16
    max_running: int = 4


def tell(**facts: object) -> None:
    """A line for the driver."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class StubEngine(FaultEngine):
    """Takes its time; `watch` sees every step in the middle."""

    def __init__(self, config: StubConfig, watch: StubWatch) -> None:
        super().__init__(config.num_blocks, 4)
        self._step_s, self._watch = config.step_s, watch

    def execute(self, batch: Batch, on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        time.sleep(self._step_s / 2)
        self._watch.computing(batch)
        time.sleep(self._step_s / 2)
        try:
            return super().execute(batch, on_layers)
        except RuntimeError:
            tell(raised=self.num_raised)
            raise


class StubWatch:
    """Recognises the moments in what a worker hears and says; see `fault_moments`."""

    def __init__(self, name: str, hold_s: float) -> None:
        self._name, self._hold_s = name, hold_s
        self._victims: dict[bytes, tuple[str, str]] = {}  # ticket → request, the worker at the other end
        self._told: set[str] = set()
        self._num_pushes: dict[Ticket, int] = {}
        self._offered_at: dict[bytes, float] = {}

    def computing(self, batch: list[ScheduledSeq]) -> None:
        for entry in batch:
            if entry.seq.key.attempt == 1 and entry.seq.is_prefilling and not entry.sample:
                self._at(entry.seq.key.request_id, Moment.MID_PREFILL)

    def command(self, frame: FromRouter) -> None:
        match frame.body:
            case StartPrefill(request_id=request_id, attempt=1) as start:
                self._victims[start.ticket] = (request_id, start.decode_worker)
                self._at(request_id, Moment.PREFILL_CHOSEN)
            case StartDecode(request_id=request_id, attempt=1, ticket=bytes() as ticket) as start:
                self._victims[ticket] = (request_id, start.prefill_worker or "")

    def link(self, event: LinkEvent) -> None:
        if isinstance(event, MessageArrived) and isinstance(event.message, Offer):
            self._offered_at[event.message.ticket] = time.monotonic()

    def tick(self) -> None:
        for ticket, offered_at in list(self._offered_at.items()):
            if time.monotonic() - offered_at > QUEUED_ON_DECODE_S:
                del self._offered_at[ticket]
                self._at_ticket(ticket, Moment.DECODE_QUEUED)

    def sift(self, effects: list[CoreEffect]) -> list[CoreEffect]:
        """What may leave; everything but the Ack that has to get lost."""
        return [effect for effect in effects if not self._sees(effect)]

    def _sees(self, effect: CoreEffect) -> bool:
        match effect:
            case SendMessage(message=Grant(ticket=ticket)):
                self._offered_at.pop(ticket, None)
                self._at_ticket(ticket, Moment.HANDSHAKE)
            case SendBlocks(ticket=ticket):
                self._num_pushes[ticket] = self._num_pushes.get(ticket, 0) + 1
                if self._num_pushes[ticket] == 2:
                    self._at_ticket(ticket, Moment.MID_TRANSFER)
            case SendMessage(message=Done(ticket=ticket)):
                self._at_ticket(ticket, Moment.DECODE_UNAWARE)
            case SendMessage(message=Ack(ticket=ticket)):
                return self._at_ticket(ticket, Moment.ACK_LOST)
            case Tell(message=Output() as output):
                self._on_output(output)
        return False

    def _on_output(self, output: Output) -> None:
        for item in output.items:
            if item.attempt != 1:
                continue
            if item.finish_reason is not None:
                self._at(item.request_id, Moment.FINISH)
            elif item.index == 0:
                self._at(item.request_id, Moment.FIRST_TOKEN)
            elif item.index >= MID_STREAM_INDEX:
                self._at(item.request_id, Moment.MID_STREAM)

    def _at_ticket(self, ticket: bytes, moment: Moment) -> bool:
        victim = self._victims.get(ticket)
        return victim is not None and self._at(victim[0], moment)

    def _at(self, request_id: str, moment: Moment) -> bool:
        """Tell and wait, once for each request, at the moment its id names; whether it does."""
        if not request_id.startswith(f"victim/{moment.name}/") or request_id in self._told:
            return False
        self._told.add(request_id)
        peer = next((peer for name, peer in self._victims.values() if name == request_id), "")
        tell(moment=moment.name, request=request_id, worker=self._name, peer=peer, at=time.monotonic())
        time.sleep(self._hold_s)
        return True


class StubCore(WorkerCore):
    """The real core; `watch` sees what goes in and what comes out."""

    watch: StubWatch

    def on_frame(self, frame: FromRouter) -> list[CoreEffect]:
        self.watch.command(frame)
        return super().on_frame(frame)

    def on_link(self, event: LinkEvent) -> list[CoreEffect]:
        self.watch.link(event)
        return super().on_link(event)

    def tick(self) -> list[CoreEffect]:
        self.watch.tick()
        return super().tick()

    def _collect(self) -> list[CoreEffect]:
        return self.watch.sift(super()._collect())


class ProxiedMesh(SocketMesh):
    """Tells others to knock at a proxy, and the proxy where it really listens."""

    def __init__(self, config: StubConfig, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._config = config
        fresh = Path(config.runtime_dir, f"{config.name}.kv.new")
        fresh.write_text(super().address, encoding="ascii")
        fresh.rename(fresh.with_suffix(""))

    @property
    def address(self) -> str:
        return str(KvAddress(None, ("127.0.0.1", self._config.kv_port)))


def serve(config: StubConfig) -> int:
    """Run the worker until SIGTERM; its exit status."""
    key = WorkerKey(config.name, new_epoch(SecureIds()))
    watch = StubWatch(config.name, config.hold_s)
    with full_disk(_takes_full_start(config)):
        engine = StubEngine(config, watch)
    threading.Thread(target=_obey, args=(engine,), name="commands", daemon=True).start()
    secret = bytes.fromhex(config.cluster_key)
    turns = TurnWatch(MonotonicClock())

    def make_core(engine: Engine, clock: Clock) -> WorkerCore:
        core = StubCore(
            key,
            config.role,
            engine,
            pool := BlockPool(engine.spec.num_blocks, engine.spec.block_size),
            [_role(config, key, engine, pool, secret)],
            clock,
            max_batch_tokens=config.max_batch_tokens,
        )
        core.watch = watch
        return core

    def make_mesh(engine: Engine, on_event: OnEvent) -> SocketMesh:
        return ProxiedMesh(
            config,
            key,
            config.role,
            engine.spec.fingerprint,
            engine.memory,
            on_event,
            runtime_dir=Path(config.runtime_dir),
            cluster_key=secret,
            settings=MeshSettings(("tcp",)),
            times=LinkTimes(renew_s=config.lease_s / 5),
        )

    who = Incarnation(key, config.role, config.router_address, drain_s=10.0)
    return run_worker(who, engine, make_core, make_mesh, turns)


def _role(
    config: StubConfig, key: WorkerKey, engine: Engine, pool: BlockPool, secret: bytes
) -> PrefillRole | DecodeRole:
    if config.role == "prefill":
        sizes = PushSizes(engine.spec.fingerprint.num_layers, most=6, least=2)
        return PrefillRole(key, engine.spec, pool, SourceTable(config.lease_s, config.lease_s, sizes), secret)
    return DecodeRole(key, engine.spec, pool, DestinationTable(config.lease_s), secret, config.max_running)


def _takes_full_start(config: StubConfig) -> bool:
    """Whether this start is one of those that find no space; the driver has written down how many are to come."""
    file = Path(config.runtime_dir, f"{config.name}.full")
    try:
        left = int(file.read_text())
    except FileNotFoundError:
        return False
    file.write_text(str(left - 1))
    return left > 0


def _obey(engine: StubEngine) -> None:
    """Commands of the driver, on a thread of their own; without a driver there is nothing to live for."""
    wall, hoard = SteppedWallClock(), bytearray()
    for line in sys.stdin:
        match line.split():
            case ["fail-step"]:
                engine.arm()
            case ["step-clock", seconds]:
                wall.step(float(seconds))
                tell(clock_offset_s=wall.offset_s())
            case ["read-clock"]:
                tell(clock_offset_s=wall.offset_s(), readers=sorted(wall.readers))
            case ["eat-memory", mebibytes]:
                hoard += b"x" * (int(mebibytes) << 20)
    os._exit(1)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)9.0f %(name)s %(message)s", stream=sys.stderr)
    return serve(msgspec.json.decode(sys.argv[1], type=StubConfig))


if __name__ == "__main__":
    raise SystemExit(main())
