"""Where there is no GPU, Triton's kernels are tested through its interpreter."""

from __future__ import annotations

import os

import torch


def interpret_triton() -> None:
    """To be called before Triton is imported, which is when it asks."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
