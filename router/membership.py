"""Who is there: workers join, speak, hang, fall silent, leave; everyone is told who the others are."""

from __future__ import annotations

import logging

from ..core.clock import Clock
from ..core.errors import NodeLost
from ..core.ids import WorkerKey
from ..protocol.messages import (
    BlockNews,
    FromRouter,
    Heartbeat,
    Hello,
    Peers,
    ResetPrefixCache,
    SetRole,
    WatchBlocks,
    Welcome,
)
from .config import RouterConfig
from .effects import Send
from .lifecycle import Lifecycle
from .readiness import Readiness
from .registry import Greeting, Registry, Standing, WorkerRecord
from .reports import Reports
from .timers import Timers

log = logging.getLogger(__name__)


class Membership:
    """The one place where a worker joins and leaves."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        router_epoch: str,
        registry: Registry,
        timers: Timers[str | WorkerKey],
        life: Lifecycle,
        reports: Reports,
        readiness: Readiness,
    ) -> None:
        self._config = config
        self._clock = clock
        self._epoch = router_epoch
        self._registry = registry
        self._timers = timers
        self._life = life
        self._reports = reports
        self._readiness = readiness

    def on_hello(self, key: WorkerKey, hello: Hello) -> None:
        replaced = self._registry.replaced_by(key)
        if replaced is not None:
            self.lose(replaced, f"replaced by {key}", is_final=True)
        before = self._registry.find(key)
        standing = before.standing if before else None
        greeting, worker = self._registry.greet(key, hello, self._clock.now())
        if greeting is Greeting.STALE or worker is None:
            self._life.counters.stale_messages += 1
            return
        self._timers.arm(key, self._clock.now() + self._config.worker_timeout_s)
        if greeting is Greeting.REFUSED:
            if standing is not Standing.REFUSED:
                log.warning("worker %s (%s) refused: %s", key, hello.role, worker.refusal)
            return
        self.command(worker, Welcome())
        if greeting is Greeting.JOINED:
            self._watch_blocks(worker)
        if greeting is Greeting.AGAIN:
            self._introduce(worker)
            return
        log.info("worker %s joined: %s, pid %d, %d blocks", key, hello.role, hello.pid, hello.total_blocks)
        self.introduce_all()

    def on_heartbeat(self, key: WorkerKey, beat: Heartbeat) -> None:
        worker = self._registry.find(key)
        if worker is None:
            self._life.counters.stale_messages += 1
            other = self._registry.current(key.worker_id)
            if beat.received and (other is None or not other.is_live):
                # Welcomed by an earlier router: hearing this one's epoch makes it say Hello again.
                self._life.effects.append(Send(key, FromRouter(self._epoch, 0, Peers([]))))
            return
        if not worker.is_live and not self._take_back(worker):
            self._life.counters.stale_messages += 1
            return
        was_ready, was_stalled, links, role = worker.is_ready, worker.is_stalled, worker.linked, worker.hello.role
        others = worker.others
        worker.note_heartbeat(beat, self._clock.now())
        if worker.others != others:
            self._on_others(worker)
        if worker.is_ready != was_ready or worker.linked != links:
            self._life.has_news = True
            self._readiness.note_change()
        if worker.hello.role != role:
            log.info("worker %s is for %s now, it was for %s", key, worker.hello.role, role)
            self._readiness.note_change()
            self.introduce_all()
        if worker.is_stalled != was_stalled:
            self._on_stall_change(worker)
        if not worker.is_stalled:
            self._reports.settle(worker, beat)
        self._repeat_introduction(worker)
        if self._life.placer.blocks.is_late(key, beat.news, self._clock.now(), self._config.unacknowledged_s):
            self._watch_blocks(worker)

    def on_block_news(self, key: WorkerKey, news: BlockNews) -> None:
        worker = self._registry.find(key)
        if worker is None or not worker.is_live:
            self._life.counters.stale_messages += 1
        elif not self._life.placer.blocks.on_news(key, news):
            self._watch_blocks(worker)

    def _watch_blocks(self, worker: WorkerRecord) -> None:
        blocks = self._life.placer.blocks
        if blocks.is_on:
            self.command(worker, WatchBlocks(blocks.begin(worker.key)))

    def _take_back(self, worker: WorkerRecord) -> bool:
        if not self._registry.take_back(worker, self._clock.now()):
            return False
        log.warning("worker %s speaks again", worker.key)
        self._watch_blocks(worker)
        self._timers.arm(worker.key, self._clock.now() + self._config.worker_timeout_s)
        self.introduce_all()
        return True

    def on_goodbye(self, key: WorkerKey) -> None:
        worker = self._registry.find(key)
        if worker is None or worker.is_final:
            self._life.counters.stale_messages += 1
        else:
            self.lose(worker, "said goodbye", is_final=True)

    def on_worker_timer(self, key: WorkerKey) -> None:
        worker = self._registry.find(key)
        if worker is None or worker.standing is Standing.LOST:
            return
        silent_since = worker.last_seen + self._config.worker_timeout_s
        if self._clock.now() < silent_since:
            self._timers.arm(key, silent_since)
        else:
            self.lose(worker, f"silent for {self._config.worker_timeout_s:g} s", is_final=False)

    def lose(self, worker: WorkerRecord, reason: str, is_final: bool) -> None:
        was_live = worker.is_live
        self._registry.retire(worker, reason, is_final)
        self._timers.disarm(worker.key)
        if not was_live:
            return
        log.warning("worker %s lost: %s", worker.key, reason)
        self._life.counters.workers_lost += 1
        self._life.placer.forget(worker.key)
        self._life.move_away(worker, NodeLost(f"worker {worker.key.worker_id} was lost: {reason}"))
        self.introduce_all()

    def _on_others(self, worker: WorkerRecord) -> None:
        """Other routers have more or less there than before: their prompts take time, their ends make room."""
        self._life.has_news = True
        num_tokens = worker.others.queued_tokens
        prefill_s = self._life.placer.model.prefill_s(worker.key, num_tokens, 0, worker.num_running)
        worker.prompts.others_s = prefill_s if num_tokens else 0.0

    def _on_stall_change(self, worker: WorkerRecord) -> None:
        """Its threads live and its loop does not turn: nothing it runs can be waited for. It keeps its links and its
        memory; when it turns again it finds the Aborts and is used as before.
        """
        if not worker.is_stalled:
            log.warning("worker %s turns again", worker.key)
            return
        log.warning("worker %s hangs: its loop has not turned for %.1f s", worker.key, worker.turn_age_s)
        self._life.counters.workers_stalled += 1
        self._life.move_away(worker, NodeLost(f"worker {worker.key.worker_id} hangs in a step"))

    def _introduce(self, worker: WorkerRecord) -> None:
        worker.peers_sent_at = self._clock.now()
        self.command(worker, Peers(self._registry.peers_of(worker)))

    def introduce_all(self) -> None:
        self._life.has_news = True
        for worker in self._registry.live():
            self._introduce(worker)

    def _repeat_introduction(self, worker: WorkerRecord) -> None:
        """A decode worker that stays without a link to a prefill worker may have missed its Peers."""
        if worker.hello.role == "prefill":
            return
        if self._clock.now() - worker.peers_sent_at < self._config.unacknowledged_s:
            return
        if any(peer.hello.role == "prefill" and peer.key not in worker.linked for peer in self._registry.live()):
            self._introduce(worker)

    def command(self, worker: WorkerRecord, body: Welcome | Peers | ResetPrefixCache | SetRole | WatchBlocks) -> None:
        """Send it the next numbered command."""
        self._life.effects.append(worker.command(self._epoch, body))
