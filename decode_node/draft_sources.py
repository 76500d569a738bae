"""Draft models and draft heads beside an engine, as `build_speculation` asks for them. Imports torch late."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.config import Topology
from ..engine.core_share import SharingEngine
from ..engine.interface import Engine
from ..engine.speculation.build import Openers
from ..engine.speculation.interface import Proposer


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """How a draft model is loaded; see `TorchEngine.load`."""

    kv_bytes: int = 256 << 20
    dtype: str = "auto"
    quantization: str = "auto"


def draft_options(topology: Topology) -> DraftOptions:
    model = topology.model
    return DraftOptions(topology.speculation.draft_kv_bytes, model.dtype, model.quantization)


def openers(engine: Engine, options: DraftOptions) -> Openers:
    """What drafts beside `engine`, on its threads."""
    return Openers(lambda source: _open_draft(engine, options, source), lambda source: _open_head(engine, source))


def _open_draft(engine: Engine, options: DraftOptions, source: str) -> Engine:
    """The draft model at `source`, with a cache of its own."""
    from ..engine.saturation import STEPS
    from ..engine.torch_engine import TorchEngine

    draft = TorchEngine.load(
        Path(source),
        model_name="draft",
        dtype=options.dtype,
        quantization=options.quantization,
        kv_bytes=options.kv_bytes,
        block_size=engine.spec.block_size,
        measures_steps=STEPS[-1],
    )
    if isinstance(engine, SharingEngine):
        engine.add_engine(draft.set_num_threads)
    return draft


def _open_head(engine: Engine, source: str | None) -> Proposer | None:
    """The draft head at `source`, or the one that comes with the project for this model."""
    from ..engine.speculation.open_head import open_head, open_shipped_head
    from ..engine.torch_engine import TorchEngine

    inner = engine.inner if isinstance(engine, SharingEngine) else engine
    if not isinstance(inner, TorchEngine):
        return None
    return open_shipped_head(inner) if source is None else open_head(inner, Path(source))
