from __future__ import annotations

from penstock.engine.threads import thread_environment


def test_threads_spin_for_less_than_a_step() -> None:
    environment = thread_environment(4)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "4"
    assert 0 < int(environment["GOMP_SPINCOUNT"]) <= 10_000  # libgomp's own default is 300,000
    assert environment["KMP_BLOCKTIME"] == "0"
