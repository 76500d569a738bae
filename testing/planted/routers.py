"""Bugs of workers that serve several routers: one router's life is taken for another's."""

from __future__ import annotations

from typing import Any

from ...core.ids import MAIN_ROUTER
from ...decode_node.role import DecodeRole
from ...prefill_node.role import PrefillRole
from ...router.registry import WorkerRecord
from ...worker.block_news import BlockNewsDesk
from ...worker.core import WorkerCore
from .bug import Bug, Seeds, plants
from .handoffs import ANY, CALM


def void_all(original: Any) -> Any:
    def abort_all(self: WorkerCore, router: str, now: float) -> None:
        for name in self._routers.epochs.keys() | {router}:
            original(self, name, now)

    return abort_all


def one_name_space(original: Any) -> Any:
    def on_command(self: Any, message: Any, now: float, router: str) -> None:
        original(self, message, now, MAIN_ROUTER)

    return on_command


def count_twice(original: Any) -> Any:
    def note_others(self: WorkerRecord, others: Any) -> None:
        original(self, others)
        self.used_blocks += others.blocks  # counted twice

    return note_others


def keep_quiet(original: Any) -> Any:
    return lambda self, block_hash: None


ROUTER_BUGS = [
    Bug(
        "void-all",
        "of our own",
        "a router that is started again ends what other routers have asked for",
        plants((WorkerCore, "_abort_all", void_all)),
        Seeds("I1", ANY),
    ),
    Bug(
        "one-name-space",
        "of our own",
        "requests of two routers that have the same id are taken for one",
        plants((DecodeRole, "on_command", one_name_space), (PrefillRole, "on_command", one_name_space)),
        Seeds("I14", CALM),
    ),
    Bug(
        "others-twice",
        "of our own",
        "what other routers hold on a worker is counted twice when it changes",
        plants((WorkerRecord, "_note_others", count_twice)),
        Seeds("I11", ANY),
    ),
    Bug(
        "silent-eviction",
        "of our own",
        "a worker does not tell that a block is no longer in its prefix cache",
        plants((BlockNewsDesk, "removed", keep_quiet)),
        Seeds("I13", ANY),
    ),
]
