"""How often a stream went on behind tokens that the caller has: counted once for each attempt that delivers there."""

from __future__ import annotations


def test_undisturbed_request_is_resumed_zero_times(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=2)
    rig.out(2, end="length")
    assert (rig.ends["r"].resumed, rig.core.counters.resumed) == (0, 0)


def test_attempt_lost_before_its_first_token_resumes_nothing(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=2)
    rig.failed(retriable=True)
    rig.out(2, end="length")
    assert (rig.ends["r"].attempts, rig.ends["r"].resumed) == (2, 0)


def test_each_attempt_that_goes_on_behind_tokens_counts_once(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=4)
    rig.out(1)
    rig.failed(retriable=True)
    rig.out(1)
    rig.out(1)
    rig.failed(retriable=True)
    rig.out(1, end="length")
    assert (rig.ends["r"].attempts, rig.ends["r"].resumed, rig.core.counters.resumed) == (3, 2, 2)


def test_resumption_that_delivers_nothing_is_an_attempt_and_no_resumption(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=3)
    rig.out(1)
    rig.failed(retriable=True)
    rig.failed(retriable=True)
    rig.out(2, end="length")
    assert (rig.ends["r"].attempts, rig.ends["r"].resumed) == (3, 1)


def test_finish_lost_behind_the_last_token_needs_no_further_attempt(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=2)
    rig.out(2)
    rig.failed(retriable=True)
    end = rig.ends["r"]
    assert (end.error, end.attempts, end.resumed, rig.finished["r"]) == (None, 1, 0, {0: "length"})


def test_request_that_ends_with_an_error_tells_how_often_it_was_resumed(rig):
    worker = rig.join("d0", "both")
    rig.submit(max_tokens=4)
    rig.out(1)
    rig.failed(retriable=True)
    rig.out(1)
    rig.failed(retriable=False, code="internal_error")
    assert rig.ends["r"].error is not None
    assert rig.ends["r"].resumed == 1
    assert rig.live_on(worker) == []


def test_resumption_prefills_where_the_prompt_was_prefilled_though_another_is_idler(rig):
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        rig.join(name, role)
    rig.submit()
    first, _ = rig.prefill()
    rig.prefill_ended()
    rig.out(1)
    rig.submit("other", prompt=100)
    assert rig.prefill("other")[0] == first, "now it has more to do than p1"
    rig.goodbye(rig.start()[0])
    assert (rig.start()[1].attempt, rig.prefill()[0]) == (2, first)
    rig.prefill_ended(ok=False)  # its own fault: the next attempt avoids it
    assert (rig.start()[1].attempt, rig.prefill()[0] != first) == (3, True)
