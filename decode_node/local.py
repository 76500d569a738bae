"""One request on one engine, in this process: what `penstock generate` uses, and the shortest way through the decode
role.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..core.clock import Clock, MonotonicClock
from ..core.errors import describe
from ..core.ids import WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine
from ..engine.speculation.build import build_speculation
from ..engine.speculation.interface import Speculation
from ..kvtransfer.destination import DestinationTable
from ..protocol.messages import AttemptFailed, ChoiceState, FromRouter, Output, StartDecode, Tokens, pack_ids
from ..protocol.sampling import SamplingParams
from ..worker.core import CoreEffect, WorkerCore
from ..worker.role import Tell
from .draft_sources import DraftOptions, openers
from .role import DecodeRole

DRAFT_TOKENS = 8  # of the longest draft

_EPOCH = "0" * 16


class LocalRunner:
    """Runs one request at a time on `engine`; its prefix cache lives as long as the runner."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock | None = None,
        max_batch_tokens: int = 512,
        speculation: Speculation | None = None,
    ) -> None:
        pool = BlockPool(engine.spec.num_blocks, engine.spec.block_size)
        key = WorkerKey("local", _EPOCH)
        role = DecodeRole(
            key, engine.spec, pool, DestinationTable(lease_s=60.0), cluster_key=b"", speculation=speculation
        )
        self.core = WorkerCore(
            key, "both", engine, pool, [role], clock or MonotonicClock(), max_batch_tokens=max_batch_tokens
        )
        self._number = 0

    @classmethod
    def open(
        cls,
        path: Path,
        model_name: str,
        dtype: str,
        num_threads: int,
        quantization: str = "auto",
        speculative: str = "off",
    ) -> LocalRunner:
        """A runner on the model at `path`; `speculative`: see `build_speculation`. Imports torch. Raises ModelFileError
        or ConfigError.
        """
        from ..engine.torch_engine import TorchEngine

        engine = TorchEngine.load(
            path,
            model_name=model_name,
            dtype=dtype,
            quantization=quantization,
            num_threads=num_threads,
            measures_steps=0 if speculative == "off" else 1 + DRAFT_TOKENS,
        )
        drafts = openers(engine, DraftOptions(dtype=dtype, quantization=quantization))
        clock = MonotonicClock()
        speculation = build_speculation(speculative, DRAFT_TOKENS, engine.spec, drafts, clock)
        return cls(engine, clock, speculation=speculation)

    def stream(self, prompt_ids: list[int], params: SamplingParams, timeout_s: float = 1e6) -> Iterator[Tokens]:
        """The tokens of every choice as they come; each choice's last item has a finish_reason. Raises ServeError if
        refused.
        """
        self._number += 1
        choices = [ChoiceState(i) for i in range(params.n)]
        command = StartDecode(f"local-{self._number}", 0, pack_ids(prompt_ids), params, choices, timeout_s)
        effects = self.core.on_frame(FromRouter(_EPOCH, self._number, command))
        unfinished = params.n
        while True:
            for item in items_of(effects):
                unfinished -= item.finish_reason is not None
                yield item
            if not unfinished:
                return
            batch, effects = self.core.begin_step()
            effects = effects + self.core.end_step(batch, self.core.compute(batch))


def items_of(effects: list[CoreEffect]) -> Iterator[Tokens]:
    """What these effects tell of tokens. Raises the error of an attempt that failed."""
    for effect in effects:
        match effect:
            case Tell(message=Output(items=items)):
                yield from items
            case Tell(message=AttemptFailed(code=code, message=message)):
                raise describe(code, message)
            case _:
                continue
