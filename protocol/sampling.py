"""How one request is sampled. The same frozen struct goes from the gateway to the sampler."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_TOKENS = 1 << 20
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 64

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bounds are checked by the codec on every decode and by `check` wherever one is built by hand.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 are off. Penalties as OpenAI defines presence and
    frequency (over generated tokens) and as CTRL defines repetition (over prompt and generated tokens; 1 is off).
    logprobs: None for none, else the number of alternatives next to the chosen token. Logprobs are those of the
    model, before penalties and temperature. seed: 63 bits; each draw depends on (seed, token index) alone.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] = 16
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=MAX_LOGIT_BIAS)
    ] = {}
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_STOP_IDS)] = ()
    ignore_eos: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_plain_greedy(self) -> bool:
        """The likeliest token is drawn, whatever came before it."""
        return self.is_greedy and not (self.has_penalties or self.logit_bias or self.min_tokens)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def check(params: SamplingParams) -> SamplingParams:
    """`params` as the codec would accept them; raises msgspec.ValidationError that names the field."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
