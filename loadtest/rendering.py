"""Parts of a prompt as token ids or as text. The same seed and salt give the same prompt on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .plan import Filling, Part

# Common words: one token each, with the space before it, in nearly every vocabulary of 30,000 tokens and more.
_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea body information back parent
face others level office door health person art war history party result change morning reason research girl guy
moment air teacher force education foot boy age policy process music market sense nation plan college interest death
experience effect use class control field development role effort rate heart drug show leader light voice wife
police mind price report decision son view relationship town road arm difference value building action season
society tax director position player record paper space ground form event official matter center couple site project
activity star table need court oil situation cost industry figure street image phone data picture practice piece
land product doctor wall news test
"""
WORDS = tuple(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Renderer:
    """How random parts become ids or words.

    `salt` is part of every seed and is written before prescribed text, unless it is 0: two runs with different salts
    share no prefix. `overhead_tokens` is what a chat template adds; it is taken from the last random part of a message.
    """

    salt: int = 0
    low_id: int = 1000
    high_id: int = 30000
    tokens_per_word: float = 1.0
    overhead_tokens: int = 0
    is_salting_text: bool = True

    def ids(self, parts: Sequence[Part]) -> list[int]:
        """Token ids; every part must be a Filling."""
        found: list[int] = []
        for part in parts:
            if isinstance(part, str):
                raise TypeError("a prompt with prescribed text cannot be sent as token ids")
            draw = np.random.default_rng([self.salt, *part.seed])
            found += draw.integers(self.low_id, self.high_id, part.num_tokens).tolist()
        return found

    def text(self, parts: Sequence[Part], is_first: bool = True) -> str:
        """Text; `is_first` where nothing was said before it, so that the salt comes first of all."""
        pieces = [f"[{self.salt:08x}]"] if is_first and self._writes_salt(parts) else []
        last = max((i for i, part in enumerate(parts) if isinstance(part, Filling)), default=-1)
        for i, part in enumerate(parts):
            pieces.append(
                part if isinstance(part, str) else self._words(part, self.overhead_tokens if i == last else 0)
            )
        return " ".join(pieces)

    def _writes_salt(self, parts: Sequence[Part]) -> bool:
        return self.salt != 0 and self.is_salting_text and bool(parts) and isinstance(parts[0], str)

    def _words(self, part: Filling, less: int) -> str:
        count = max(1, round((part.num_tokens - less) / self.tokens_per_word))
        draw = np.random.default_rng([self.salt, *part.seed])
        return " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), count))
