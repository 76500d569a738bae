"""How the router can pick workers, by name. Apart from the topology, whose classes take a command time to load."""

from __future__ import annotations

from typing import Literal

PolicyName = Literal[
    "auto",
    "kv-overlap",
    "prefix-affinity",
    "session-affinity",
    "least-loaded",
    "power-of-two",
    "round-robin",
    "random",
]
