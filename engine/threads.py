"""How compute threads behave; no torch here, because the settings count only before torch is imported.

Two processes share the cores of a small machine: a prefill worker and a decode worker. A thread that spins while it
waits for its team takes the core from the other process, so waiting is passive after a very short spin (the gap
between two small operators).
"""

from __future__ import annotations

SPIN_COUNT = 10_000  # about as long as the gap between two operators of a decode step; far shorter than a step


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment variables for a process that computes with `num_threads` threads."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
