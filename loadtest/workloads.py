"""Workloads made of random tokens: independent prompts, shared prefixes, conversations of several turns.

Lengths depend on `seed` alone; what the prompts say also depends on the renderer's salt, so that two runs can be of the
same shape and share nothing in a prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lengths import Lengths
from .plan import Conversation, Filling, Part, Turn

# The first number of a filling's seed says what it is, so that no two kinds ever draw the same tokens.
PROMPT, PREFIX, USER, ASSISTANT, TRACE_BLOCK, TRACE_PROMPT = range(6)


def random_prompts(count: int, prompt: Lengths, output: Lengths, seed: int) -> list[Conversation]:
    """Prompts that have nothing in common."""
    random = np.random.default_rng([seed, 2])
    pairs = zip(prompt.draw(random, count), output.draw(random, count), strict=True)
    return [Conversation((Turn((Filling((PROMPT, seed, i), n),), out),)) for i, (n, out) in enumerate(pairs)]


def shared_prefixes(
    count: int, num_prefixes: int, prefix_tokens: int, prompt: Lengths, output: Lengths, seed: int
) -> list[Conversation]:
    """Each prompt is one of `num_prefixes` prefixes, drawn evenly, and something of its own."""
    random = np.random.default_rng([seed, 3])
    chosen = random.integers(0, num_prefixes, count)
    pairs = zip(prompt.draw(random, count), output.draw(random, count), strict=True)
    return [
        Conversation(
            (Turn((Filling((PREFIX, seed, int(k)), prefix_tokens), Filling((PROMPT, seed, i), n)), out),),
            category=f"prefix-{k}",
        )
        for i, (k, (n, out)) in enumerate(zip(chosen, pairs, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class ChatShape:
    """How synthetic conversations go. With `is_aged` each is met at a random turn, as in a system that has run for
    long; else all begin with their first.
    """

    num_turns: Lengths
    message: Lengths
    output: Lengths
    think_s: float = 0.0
    is_aged: bool = True


def chats(count: int, shape: ChatShape, seed: int) -> list[Conversation]:
    """`count` conversations."""
    random = np.random.default_rng([seed, 4])
    found = []
    for i, num_turns in enumerate(shape.num_turns.draw(random, count)):
        messages, outputs = shape.message.draw(random, num_turns), shape.output.draw(random, num_turns)
        past = int(random.integers(0, num_turns)) if shape.is_aged else 0
        users = [Filling((USER, seed, i, turn), n) for turn, n in enumerate(messages)]
        history: list[tuple[Part, Part]] = [
            (users[turn], Filling((ASSISTANT, seed, i, turn), outputs[turn])) for turn in range(past)
        ]
        turns = tuple(Turn((users[turn],), outputs[turn]) for turn in range(past, num_turns))
        found.append(Conversation(turns, tuple(history), think_s=shape.think_s))
    return found
