"""From logits to tokens for all rows of a step, on the device and without waiting for it.

    logits → + bias → penalties → temperature → top-k → top-p → min-p → draw    (greedy: argmax)

The rules are those of the engine's sampler: the filters together are one cutoff, tokens that tie with it are all kept,
and the draw is a race whose times depend on (seed, index, token) alone. So the same seed draws the same token here and
there, but where two tokens arrive together up to rounding.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from . import reference
from .rows import Bias, Drawn, Penalties, SamplingRows

MAX_VOCAB = 1 << 24

_ROW_TYPES = {
    "seeds": torch.int64,
    "indices": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "num_top": torch.int32,
}


def draw_tokens(
    logits: torch.Tensor,
    rows: SamplingRows,
    bias: Bias | None = None,
    penalties: Penalties | None = None,
    most_top: int = 0,
) -> Drawn:
    """One token for each row of logits [rows, vocab_size], of any float type; rows may be strided.

    most_top: the largest of `rows.num_top`, known to the host. Adds what is drawn to `penalties.uses`, in which no two
    rows share a state. The values of the arrays are not looked at, they are the caller's to bound. Raises
    InternalError. Reference: `reference.draw_tokens`.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or logits.stride(1) != 1:
        raise InternalError(f"logits are {list(logits.shape)} {logits.dtype}, not [rows, vocab_size] in dense rows")
    if not 0 < logits.shape[1] <= MAX_VOCAB or most_top < 0:
        raise InternalError(f"{logits.shape[1]} logits a row, {most_top} alternatives")
    _check_rows(logits, {name: (getattr(rows, name), dtype) for name, dtype in _ROW_TYPES.items()})
    if bias is not None:
        _check_bias(logits, bias)
    if penalties is not None:
        _check_penalties(logits, penalties)
    if not runs_triton(logits):
        return reference.draw_tokens(logits, rows, bias, penalties, most_top)
    from .kernel import launch

    drawn = reference.empty_drawn(logits, most_top)
    launch(logits, rows, bias, penalties, drawn)
    return drawn


def _check_rows(logits: torch.Tensor, arrays: dict[str, tuple[torch.Tensor, torch.dtype]], more: int = 0) -> None:
    """Each array is [rows + more] of its type."""
    for name, (array, dtype) in arrays.items():
        if array.shape != (logits.shape[0] + more,) or array.dtype != dtype or not array.is_contiguous():
            raise InternalError(f"{name} is {list(array.shape)} {array.dtype}, not [{logits.shape[0] + more}] {dtype}")
        check_same_device(logits=logits, **{name: array})


def _check_bias(logits: torch.Tensor, bias: Bias) -> None:
    _check_rows(logits, {"starts": (bias.starts, torch.int32)}, more=1)
    ids, amounts = bias.token_ids, bias.amounts
    if ids.dim() != 1 or ids.shape != amounts.shape or (ids.dtype, amounts.dtype) != (torch.int32, torch.float32):
        raise InternalError(f"bias is {list(ids.shape)} {ids.dtype} and {list(amounts.shape)} {amounts.dtype}")
    check_same_device(logits=logits, token_ids=ids, amounts=amounts)


def _check_penalties(logits: torch.Tensor, penalties: Penalties) -> None:
    uses = penalties.uses
    if uses.dim() != 2 or uses.shape[1] != logits.shape[1] or uses.dtype != torch.int32 or not uses.is_contiguous():
        raise InternalError(f"uses are {list(uses.shape)} {uses.dtype}, not [states, {logits.shape[1]}] int32")
    check_same_device(logits=logits, uses=uses)
    strengths = {name: getattr(penalties, name) for name in ("repetition", "presence", "frequency")}
    arrays = {name: (array, torch.float32) for name, array in strengths.items()}
    _check_rows(logits, {"states": (penalties.states, torch.int32), **arrays})
