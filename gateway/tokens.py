"""What the gateway needs of a tokenizer, and how a token with its logprob is shown to a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from ..protocol.messages import SampledToken

LEAST_LOGPROB = -9999.0  # OpenAI's value for "very unlikely"; JSON has no -inf


class GatewayTokenizer(Protocol):
    """models/tokenizer.py as the gateway sees it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...


class TokenChance(msgspec.Struct, frozen=True):
    """One token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(msgspec.Struct, frozen=True):
    """The chosen token with its alternatives; `offset` is the number of characters of the choice's text before it."""

    chosen: TokenChance
    top: list[TokenChance]
    offset: int


def token_label(data: bytes) -> str:
    """A token's text. Bytes that are no text by themselves are written out, so that two tokens never look the same."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_chance(tokenizer: GatewayTokenizer, token_id: int, logprob: float) -> TokenChance:
    data = tokenizer.token_bytes(token_id)
    return TokenChance(token_label(data), max(logprob, LEAST_LOGPROB), list(data))


def token_entry(tokenizer: GatewayTokenizer, sampled: SampledToken, offset: int) -> TokenEntry:
    """The entry of one sampled token. One that came without a logprob counts as very unlikely, never left out."""
    chance = sampled.logprob
    if chance is None:
        return TokenEntry(token_chance(tokenizer, sampled.token_id, LEAST_LOGPROB), [], offset)
    top = [token_chance(tokenizer, token_id, logprob) for token_id, logprob in chance.top]
    return TokenEntry(token_chance(tokenizer, sampled.token_id, chance.logprob), top, offset)
