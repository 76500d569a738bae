"""From the file of a draft head to what drafts with it beside an engine. Imports torch."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import ConfigError
from ...kernels.linear.op import Linear
from ...kernels.quant_linear.op import QuantEmbedding, QuantLinear
from ...models.decoder import Decoder, Embedding
from ...models.draft_file import load_draft_head
from ...models.shipped_heads import shipped_head
from ..torch_engine import TorchEngine
from .draft_head import HeadProposer
from .head_step import make_head_step
from .interface import MAX_DRAFT_TOKENS


def open_head(engine: TorchEngine, path: Path) -> HeadProposer:
    """The head at `path`, which from now on sees the steps of `engine`. Raises ModelFileError."""
    decoder = engine.decoder
    head = load_draft_head(path, decoder.config, decoder.weights.embedding, head_matrix(decoder))
    step = make_head_step(head, engine.spec.max_sequence_tokens + MAX_DRAFT_TOKENS, lambda: engine.num_threads)
    proposer = HeadProposer(head, step)
    engine.show_steps(proposer.taps, proposer.observe)
    return proposer


def open_shipped_head(engine: TorchEngine) -> HeadProposer | None:
    """The head that comes with the project for this model; None where there is none."""
    path = shipped_head(engine.identity)
    return None if path is None else open_head(engine, path)


def head_matrix(decoder: Decoder) -> Embedding:
    """The matrix that gives the logits, by rows."""
    match decoder.weights.head:
        case QuantLinear() as head:
            return QuantEmbedding(head)
        case Linear() as head:
            return head.dense()
        case head:
            raise ConfigError(f"speculation.method: the weights of a {type(head).__name__} cannot serve a draft head")
