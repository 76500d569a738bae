"""The optimisation of a draft head: AdamW under a cosine schedule, from a seed, with a file to go on from.

Weights are kept in float32 and used in bfloat16, as they are shipped. The target's embedding and head stay as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.errors import ConfigError
from ..models.decoder import Embedding
from ..models.draft_config import DraftHeadConfig
from ..models.draft_head import DraftHead
from .batches import Batch
from .loss import Teacher, unrolled_loss

_BETAS, _CLIP = (0.9, 0.95), 1.0
_LAST_SHARE = 0.05  # of the learning rate, at the end


@dataclass(frozen=True, slots=True)
class OptimiserPlan:
    """num_steps: of the unrolling. learning_rate: the highest; `warmup` batches lead up to it."""

    num_steps: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 50
    seed: int = 0

    def rate(self, num_done: int, share: float) -> float:
        """The learning rate after `num_done` batches, which are `share` of all: a ramp, then half a cosine."""
        ramp = min((num_done + 1) / self.warmup, 1) if self.warmup else 1
        return self.learning_rate * ramp * (_LAST_SHARE + (1 - _LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))


class Trainer:
    """Trains one head. `num_done`: batches so far."""

    def __init__(
        self,
        config: DraftHeadConfig,
        weights: dict[str, torch.Tensor],
        embedding: Embedding,
        lm_head: torch.Tensor,
        draft_ids: torch.Tensor,
        plan: OptimiserPlan,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """weights: float32 parameters by name, which change. lm_head [draft_vocab_size, hidden_size]: the target's rows
        of `draft_ids`; its device is that of all else.
        """
        self.config, self.plan, self.dtype, self.device = config, plan, dtype, lm_head.device
        self._embedding, self._lm_head, self.draft_ids = embedding, lm_head.to(dtype), draft_ids.to(self.device)
        self.weights = weights
        self._teacher = Teacher(self._lm_head, self.draft_ids, config.layer.vocab_size)
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [w for w in self.weights.values() if w.dim() > 1], "weight_decay": plan.weight_decay},
                {"params": [w for w in self.weights.values() if w.dim() == 1], "weight_decay": 0.0},
            ],
            lr=plan.learning_rate,
            betas=_BETAS,
        )
        self.num_done = 0

    def head(self) -> DraftHead:
        """The head as it is now, in the type in which it is used; differentiable."""
        weights = {name: weight.to(self.dtype) for name, weight in self.weights.items()}
        return DraftHead(self.config, weights, self._embedding, self._lm_head, self.draft_ids)

    def train(self, batch: Batch, share: float) -> float:
        """One batch; its loss. `share`: how much of the whole training lies before it."""
        loss = unrolled_loss(self.head(), self._teacher, batch.to(self.device, self.dtype), self.plan.num_steps)
        self.num_done += 1
        if not loss.requires_grad:  # no row of the batch counts
            return 0.0
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights.values(), _CLIP)
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.rate(self.num_done - 1, share)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        """Everything that going on needs. `facts` must be the same then."""
        tensors = {f"weight.{name}": weight.detach().cpu() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            state = self._optimiser.state.get(weight, {})
            tensors |= {f"{key}.{name}": value.cpu() for key, value in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"facts": json.dumps(dict(facts)), "num_done": str(self.num_done)})
        partial.rename(path)

    def restore(self, path: Path, facts: Mapping[str, str]) -> None:
        """Go on from what `save` wrote. Raises ConfigError for a file of another run."""
        try:
            with safe_open(path, framework="pt") as reader:
                found = reader.metadata()
                if json.loads(found["facts"]) != dict(facts):
                    raise ConfigError(f"{path}: is of a run with other settings; remove it or name another folder")
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  not a mapping
        except SafetensorError as error:
            raise ConfigError(f"{path}: {error}; remove it") from error
        self.num_done = int(found["num_done"])
        for name, weight in self.weights.items():
            weight.data.copy_(tensors.pop(f"weight.{name}"))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self._optimiser.state[weight] = {key: tensors[f"{key}.{name}"].to(_home(key, weight)) for key in keys}


def _home(key: str, weight: torch.Tensor) -> torch.device:
    """AdamW counts its steps on the CPU."""
    return torch.device("cpu") if key == "step" else weight.device
