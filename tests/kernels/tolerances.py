"""How far a kernel may be from its reference, by the type it computes in: relative and absolute."""

from __future__ import annotations

import torch

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (2e-2, 1e-2)}
