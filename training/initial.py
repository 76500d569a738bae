"""Where training begins: the best linear guess of the target's next state, from which the layer then learns to differ.

fc is the least-squares solution of

    final state of token t + 1  ≈  fc · [normed embedding of token t + 1 ; normed final state of token t]

over the answers, and the layer adds little to it at first. That is some thousand batches' worth of descent in seconds,
and since inputs and outputs are states of one kind, chains of guesses make sense from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..models.draft_config import OUR_NORMS, DraftHeadConfig, draft_shapes
from .features import Example

_RIDGE = 1e-3  # added to the squares of each input, as a share of the number of rows
_MAX_ROWS = 300_000  # more tell nothing new
_FIRST_SHARE = 0.2  # of a matrix that adds to the residual, to one that keeps its input's scale


def initial_weights(config: DraftHeadConfig, fc: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Parameters of a head of ours by name, float32 on the device of `fc` [hidden_size, 2 · hidden_size]."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"fc.weight": fc.float()}
    for name, shape in draft_shapes(config, OUR_NORMS).items():
        if len(shape) == 1 and name != "d2t":
            weights[name] = torch.ones(shape, device=fc.device)
        elif len(shape) == 2 and name not in weights:
            share = _FIRST_SHARE if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            values = torch.randn(shape, generator=generator) * share / math.sqrt(shape[1])
            weights[name] = values.to(fc.device)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


@torch.no_grad()
def linear_guess(examples: Iterable[Example], embedding: torch.Tensor, epsilon: float) -> torch.Tensor:
    """fc [hidden_size, 2 · hidden_size] float32, from the rows of `examples` that count. embedding: the target's."""
    width = embedding.shape[1]
    squares = torch.zeros(2 * width, 2 * width, device=embedding.device)
    products = torch.zeros(2 * width, width, device=embedding.device)
    num_rows = 0
    for example in examples:
        start = len(example.sample.prompt_ids) - 1
        token_ids = torch.tensor(example.sample.token_ids[start + 1 :], device=embedding.device)
        final = example.final[start:].to(embedding.device).float()
        parts = embedding[token_ids].float(), final[:-1]
        x = torch.cat([F.rms_norm(part, (width,), None, epsilon) for part in parts], dim=1)
        squares += x.T @ x
        products += x.T @ final[1:]
        num_rows += len(x)
        if num_rows >= _MAX_ROWS:
            break
    ridge = _RIDGE * max(num_rows, 1) * torch.eye(2 * width, device=embedding.device)
    fc: torch.Tensor = torch.linalg.solve(squares + ridge, products).T.contiguous()
    return fc
