"""The names a user chooses from. No imports, so that a command's help is at once there."""

from __future__ import annotations

from typing import Literal

Shape = Literal["poisson", "gamma", "constant", "linear-ramp", "exponential-ramp", "burst"]
SHAPES: tuple[Shape, ...] = ("poisson", "gamma", "constant", "linear-ramp", "exponential-ramp", "burst")

Kind = Literal[
    "random",
    "prefix",
    "chat",
    "jsonl",
    "spec-bench",
    "sharegpt",
    "documents",
    "azure",
    "burstgpt",
    "mooncake",
    "lengths",
]
SYNTHETIC: tuple[Kind, ...] = ("random", "prefix", "chat")
TEXTS: tuple[Kind, ...] = ("jsonl", "spec-bench", "sharegpt", "documents")
TRACES: tuple[Kind, ...] = ("azure", "burstgpt", "mooncake", "lengths")
KINDS: tuple[Kind, ...] = (*SYNTHETIC, *TEXTS, *TRACES)
TIMED: tuple[Kind, ...] = ("azure", "burstgpt", "mooncake")  # traces that say when requests came
