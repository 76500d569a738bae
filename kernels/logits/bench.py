"""`python -m penstock.kernels.logits.bench`: how near drawing comes to reading the logits once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..gpu_limits import Case, Work, report_all, require_cuda
from .op import draw_tokens
from .rows import SamplingRows

_VOCAB = 128_256


def cases(device: torch.device) -> Iterator[Case]:
    """Each is to be run before the next is asked for."""
    for rows, temperature, top_k, top_p in [
        (64, 0.0, 0, 1.0),
        (64, 1.0, 0, 1.0),
        (64, 1.0, 50, 0.9),
        (1, 1.0, 50, 0.9),
    ]:
        logits = torch.randn(rows, _VOCAB, device=device) * 3
        ones, counts = torch.ones(rows, device=device), torch.arange(rows, device=device)
        sampling = SamplingRows(
            counts,
            counts,
            ones * temperature,
            (ones * top_k).int(),
            ones * top_p,
            ones * 0,
            (ones * -1).int(),
        )
        greedy = draw_tokens(logits, sampling).token_ids if temperature == 0 else logits.argmax(dim=-1)
        if not torch.equal(greedy, logits.argmax(dim=-1)):
            raise AssertionError("the greedy token is not the likeliest one")
        name = f"draw {rows} rows, t={temperature} k={top_k} p={top_p}"
        yield Case(name, lambda: draw_tokens(logits, sampling), Work(logits.nbytes))


def main() -> None:
    report_all(cases(require_cuda()))


if __name__ == "__main__":
    main()
