"""What a model's files say about its tokenizer, beside the vocabulary itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class TokenizerSettings:
    """`vocab_size` is one more than the highest id. `eos_token_ids`: each ends a generation; the main one first."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    chat_template: str | None
