"""How a kernel's launch settings are chosen: by timing them once for each key, remembered on disk.

Timings are kept in Triton's cache (`TRITON_CACHE_DIR`), so a restarted worker does not repeat them. The first call for
a key runs the kernel many times and waits: make it before a CUDA graph is captured. The number of keys in a block
decides the order of a sum, so two machines that choose differently may differ in the last bits.

Stages come in odd numbers: a key is found through the block table, and Triton shares the stages between both loads,
so n stages keep (n - 1) / 2 blocks of keys in flight, and an even number only takes more registers.

Triton's interpreter has nothing to time: there one setting is used, small so that short inputs take several rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


Setting = tuple[dict[str, int], int, int]  # constants, warps, pipeline stages


def tuned(settings: list[Setting], interpreted: dict[str, int], key: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A decorator for a kernel that has the arguments HEAD_DIM, GROUP and BLOCK_SIZE.

    It is tuned for each value of these, of those named in `key`, and of the tensors' types.
    """
    configs = [triton.Config(constants, num_warps=warps, num_stages=stages) for constants, warps, stages in settings]
    decorator: Callable[[Any], Any] = triton.autotune(
        configs=[triton.Config(interpreted)] if IS_INTERPRETED else configs,
        key=["HEAD_DIM", "GROUP", "BLOCK_SIZE", *key],
        cache_results=True,
    )
    return decorator
