"""When a choice ends."""

from __future__ import annotations

from ..engine.sequence import Sequence
from ..protocol.messages import FinishReason, SampledToken


def close_with(seq: Sequence, token_id: int, eos_token_ids: frozenset[int]) -> tuple[FinishReason | None, int | None]:
    """(finish reason, stop token) if `token_id` is the next token of `seq`; a stop token is not part of the output.

    The sampler never draws a stop token before min_tokens, so none needs to be looked at here.
    """
    params = seq.params
    if token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos):
        return "stop", token_id
    if len(seq.output_ids) + 1 >= params.max_tokens:
        return "length", None
    return None, None


def append(
    seq: Sequence, tokens: tuple[SampledToken, ...], eos_token_ids: frozenset[int]
) -> tuple[tuple[SampledToken, ...], FinishReason | None, int | None]:
    """Append `tokens` up to the one that ends `seq`: (those appended, finish reason, stop token)."""
    taken: list[SampledToken] = []
    for token in tokens:
        reason, stop_token = close_with(seq, token.token_id, eos_token_ids)
        if stop_token is None:
            seq.output_ids.append(token.token_id)
            taken.append(token)
        if reason is not None:
            return tuple(taken), reason, stop_token
    return tuple(taken), None, None
