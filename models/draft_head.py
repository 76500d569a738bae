"""A draft head: one decoder layer that guesses the tokens after next out of the target's hidden states.

    row t:   features of token t   embedding of token t+1        row t+1, while token t+2 is a guess:
                       │                 │                          the layer's own output at row t in place of
                      fc (eagle3)        │                          fc(features of token t+1), which the target
                       └──── layer ──────┘  attends to rows ≤ t     has not computed yet
                               │
                    hidden ─ norm ─ head ─→ token t+2

`fuse`, `enter`, `leave` and `logits` are the parts; what lies between `enter` and `leave` is attention, which differs:
over a whole sequence (`forward`), over a cache (`draft_chain`), or unrolled (`training.unroll`). All of them are plain
functions of tensors with any leading dimensions, differentiable. Sources: EAGLE (Li et al., ICML 2024), EAGLE-3 (Li et
al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .decoder import Embedding
from .draft_config import EAGLE3, DraftHeadConfig
from .rope import rope_angles, rope_frequencies


@dataclass(frozen=True, slots=True, eq=False)
class Entrance:
    """What attention needs of rows, keys and queries rotated: q [..., num_heads, head_dim], k and v [..., num_kv_heads,
    head_dim]; and the residual [..., hidden_size].
    """

    residual: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class DraftHead:
    """The network with its weights (by their names in the file) and the target's two ends.

    embedding: the target's, or the file's own. lm_head [draft_vocab_size, hidden_size]. draft_ids [draft_vocab_size]
    int64: the target's id of each token that can be drafted.
    """

    def __init__(
        self,
        config: DraftHeadConfig,
        weights: Mapping[str, torch.Tensor],
        embedding: Embedding,
        lm_head: torch.Tensor,
        draft_ids: torch.Tensor,
    ) -> None:
        self.config, self.weights = config, weights
        self.embedding, self.lm_head, self.draft_ids = embedding, lm_head, draft_ids
        self.scale = 1 / math.sqrt(config.layer.head_dim)
        self._inv_freq, self._gain = rope_frequencies(config.layer, config.layer.max_position)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """features [..., feature_size] of tokens that the target has computed → hidden [..., hidden_size].

        In the layout eagle they are the hidden state as they stand.
        """
        return features if self.config.layout != EAGLE3 else self._join(features)

    def enter(self, hidden: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor) -> Entrance:
        """Rows of `hidden` [..., hidden_size], each with the token that follows it (token_ids [...] int64).

        positions [...] int64 are those of the rows: t for the features of token t.
        """
        embedded = self._embed(token_ids).to(hidden.dtype)
        if self.config.layout == EAGLE3:
            normed = self._norm(hidden, "hidden_norm")
            residual = normed if self.config.norm_before_residual else hidden
            x = torch.cat((self._norm(embedded, "input_layernorm"), normed), dim=-1)
        else:
            parts = (self._norm_if(embedded, "embedding_layernorm"), self._norm_if(hidden, "hidden_states_layernorm"))
            residual = self._join(torch.cat(parts, dim=-1))
            x = self._norm_if(residual, self.config.name("input_layernorm"))
        q, k, v = (self._heads(x, name) for name in ("q", "k", "v"))
        cos, sin = self._rotation(positions, q.dtype)
        return Entrance(residual, _rotated(q, cos, sin), _rotated(k, cos, sin), v)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for rows at `positions`, [rows, head_dim / 2] float32."""
        return rope_angles(positions, self._inv_freq.to(positions.device), self._gain)

    def leave(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """attended [..., num_heads, head_dim] → hidden [..., hidden_size], what the next row of a chain takes."""
        x = residual + self._linear(attended.flatten(-2), "self_attn.o_proj")
        normed = self._norm(x, "post_attention_layernorm")
        inner = F.silu(self._linear(normed, "mlp.gate_proj")) * self._linear(normed, "mlp.up_proj")
        return x + self._linear(inner, "mlp.down_proj")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., draft_vocab_size]: entry i is the logit of the target's token draft_ids[i]."""
        return F.linear(self.normed(hidden), self.lm_head)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head multiplies."""
        return self._norm_if(hidden, "norm")

    def forward(self, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [num_sequences, num_rows, hidden_size] of sequences from their start on.

        features [num_sequences, num_rows, feature_size]; token_ids [num_sequences, num_rows]: of row t, token t + 1.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        row = self.enter(self.fuse(features), token_ids, positions)
        q, k, v = (x.transpose(1, 2) for x in (row.q, row.k, row.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return self.leave(row.residual, attended.transpose(1, 2))

    def _join(self, both: torch.Tensor) -> torch.Tensor:
        """fc, of [embedding ; hidden] in the layout eagle, of features in eagle3."""
        return F.linear(both, self.weights["fc.weight"], self.weights.get("fc.bias"))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding.index_select(0, token_ids.flatten()).view(*token_ids.shape, -1)

    def _heads(self, x: torch.Tensor, name: str) -> torch.Tensor:
        product = self._linear(x, f"self_attn.{name}_proj")
        return product.view(*x.shape[:-1], -1, self.config.layer.head_dim)

    def _linear(self, x: torch.Tensor, part: str) -> torch.Tensor:
        return F.linear(x, self.weights[self.config.name(f"{part}.weight")])

    def _norm(self, x: torch.Tensor, part: str) -> torch.Tensor:
        weight = self.weights[self.config.name(f"{part}.weight")]
        return F.rms_norm(x, x.shape[-1:], weight, self.config.layer.rms_norm_eps)

    def _norm_if(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Normed where the file has a weight for it."""
        weight = self.weights.get(f"{name}.weight")
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, self.config.layer.rms_norm_eps)

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., 1, head_dim]; the sines of the first half are negated."""
        cos, sin = self.angles(positions.flatten())
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.view(*positions.shape, 1, -1).to(dtype), sin.view(*positions.shape, 1, -1).to(dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
