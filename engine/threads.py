"""How threads wait; no torch here, because the settings count only before torch is imported.

Inside a step threads wait for the next operator by spinning: a sleeping thread takes longer to wake than most operators
run, half a millisecond on some virtual machines. After a step the spin ends by itself and the process is idle.
How many threads a step may use is decided step by step: `core_share`.
"""

from __future__ import annotations

SPIN_COUNT = 200_000  # a few milliseconds: longer than a wake-up, far shorter than an idle moment


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment variables for a process that computes with up to `num_threads` threads."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        "KMP_BLOCKTIME": "20",
        "TOKENIZERS_PARALLELISM": "false",
    }
