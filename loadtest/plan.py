"""What a load test sends: conversations of turns, each turn a prompt made of parts and the length of its answer.

Random parts are named by a seed and rendered when they are needed: a trace of a hundred million tokens is a small plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

CHARS_PER_TOKEN = (
    3.0  # of English text; vocabularies of 30,000 and more need fewer tokens, so a prompt that fits by this fits
)


@dataclass(frozen=True, slots=True)
class Filling:
    """`num_tokens` random tokens; the same seed gives the same tokens, so equal fillings are a shared prefix."""

    seed: tuple[int, ...]
    num_tokens: int


Part = str | Filling


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message, or one whole prompt, and how many tokens its answer may have."""

    parts: tuple[Part, ...]
    num_output_tokens: int

    @property
    def num_prompt_tokens(self) -> int:
        """Of this turn alone; estimated where it is text."""
        return sum(part_tokens(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns sent one after the other, each behind the answer to the one before.

    `history` are turns that happened before the test: (user's parts, assistant's parts). `at_s` is when a trace
    says that the first turn came.
    """

    turns: tuple[Turn, ...]
    history: tuple[tuple[Part, Part], ...] = ()
    category: str = ""
    at_s: float | None = None
    think_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the last turn needs in the model's window: everything said, and its answer."""
        past = sum(part_tokens(part) for pair in self.history for part in pair)
        return past + sum(turn.num_prompt_tokens + turn.num_output_tokens for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations in the order of their arrival, and how many rows did not fit the model's window."""

    name: str
    conversations: tuple[Conversation, ...]
    num_clipped: int = 0
    num_left_out: int = 0
    num_repeated: int = 0  # since more were asked for than the file has
    is_exact_length: bool = True  # answers are to have exactly the planned length: the end token is ignored

    @property
    def num_requests(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    @property
    def has_conversations(self) -> bool:
        return any(len(one.turns) > 1 or one.history for one in self.conversations)


def part_tokens(part: Part) -> int:
    return part.num_tokens if isinstance(part, Filling) else int(len(part) / CHARS_PER_TOKEN) + 1


def clip_parts(parts: Iterable[Part], num_tokens: int) -> tuple[Part, ...]:
    """The leading `num_tokens` of the parts; text is cut where that many would end by the estimate."""
    kept: list[Part] = []
    room = num_tokens
    for part in parts:
        if room <= 0:
            break
        if part_tokens(part) > room:
            part = _cut(part, room)
        kept.append(part)
        room -= part_tokens(part)
    return tuple(kept)


def _cut(part: Part, num_tokens: int) -> Part:
    if isinstance(part, Filling):
        return replace(part, num_tokens=num_tokens)
    return part[: int((num_tokens - 1) * CHARS_PER_TOKEN)]


@dataclass(frozen=True, slots=True)
class Window:
    """What a model can hold: prompt and answer together. `max_tokens` None: nothing is known, everything fits."""

    max_tokens: int | None = None
    is_clipping: bool = True  # else what does not fit is left out
    reserve: int = 0  # tokens that a chat template adds

    def fit(self, conversations: Sequence[Conversation], name: str, is_exact_length: bool = True) -> Workload:
        """The workload of those that fit, clipped or left out; what was done is counted."""
        kept: list[Conversation] = []
        num_clipped = 0
        for conversation in conversations:
            fitted = self._fit_one(conversation)
            if fitted is not None:
                kept.append(fitted)
                num_clipped += fitted is not conversation
        return Workload(name, tuple(kept), num_clipped, len(conversations) - len(kept), 0, is_exact_length)

    def _fit_one(self, conversation: Conversation) -> Conversation | None:
        limit = None if self.max_tokens is None else self.max_tokens - self.reserve
        if limit is None or conversation.num_tokens <= limit:
            return conversation
        if not self.is_clipping:
            return None
        if len(conversation.turns) > 1 or conversation.history:
            return _fewer_turns(conversation, limit)
        (turn,) = conversation.turns
        num_output = min(turn.num_output_tokens, max(1, limit // 2))
        if limit - num_output < 1:
            return None
        return replace(conversation, turns=(Turn(clip_parts(turn.parts, limit - num_output), num_output),))


def _fewer_turns(conversation: Conversation, limit: int) -> Conversation | None:
    """As many leading turns as fit; the history is forgotten first."""
    fewer = replace(conversation, history=())
    while fewer.turns and fewer.num_tokens > limit:
        fewer = replace(fewer, turns=fewer.turns[:-1])
    return fewer if fewer.turns else None
