"""Who is let in, who is refused and with what, and whose turn it is: the router core with workers played by hand."""

from __future__ import annotations

import pytest

from penstock.core.config import ClassConfig
from penstock.core.errors import BadRequest, ConfigError, Overloaded, TooManyRequests
from penstock.protocol.messages import Output, Phases, SampledToken, Tokens
from penstock.router.config import RouterConfig
from penstock.router.outlook import Accuracy, even_level

CLASSES = (
    ClassConfig("interactive", 8.0, target_ttft_s=1.0, target_tpot_s=0.05),
    ClassConfig("standard", 4.0),
    ClassConfig("batch", 1.0),
)


def ask(rig, name, **fields):
    return rig.submit(name, **{"timeout_s": 600.0, **fields})


def book(rig, name):
    return next(one for one in rig.core.status().classes if one.name == name)


def first_token(rig, name, prefill_s=0.1, *, is_last=True):
    """The worker has computed the prompt in so long."""
    worker, start = rig.start(name)
    phases = Phases(prefill_s=prefill_s, cached_tokens=0)
    token = (SampledToken(rig.token_at(0, 0)),)
    item = Tokens(name, start.attempt, 0, 0, token, "length" if is_last else None, None, phases)
    rig.say(worker, Output([item]))


def teach(rig, count=20, prompt=100, prefill_s=0.5):
    """The model learns what a prompt costs: 5 ms a token."""
    for number in range(count):
        ask(rig, f"lesson-{number}", prompt=prompt)
        rig.clock.advance(prefill_s)
        first_token(rig, f"lesson-{number}", prefill_s)


def fill(rig, count=2, prompt=400):
    """Prompts that the worker has before it."""
    for number in range(count):
        ask(rig, f"busy-{number}", prompt=prompt)


# ---- classes


@pytest.mark.parametrize(
    ("priority", "name"), [(0, "standard"), (-1, "interactive"), (1, "batch"), (-9, "interactive"), (9, "batch")]
)
def test_priority_is_a_number_of_classes_before_or_behind_the_default(make_rig, priority, name):
    rig = make_rig(classes=CLASSES)
    ask(rig, "r", priority=priority)
    assert book(rig, name).queued == 1


def test_named_class_goes_before_priority(make_rig):
    rig = make_rig(classes=CLASSES)
    ask(rig, "r", class_name="batch", priority=-1)
    assert book(rig, "batch").queued == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"class_name": "vip"}, "class"),
        ({"target_ttft_s": 0.0}, "target_ttft_s"),
        ({"target_tpot_s": -1.0}, "target_tpot_s"),
        ({"target_ttft_s": float("nan")}, "target_ttft_s"),
        ({"tenant": "t" * 300}, "tenant"),
    ],
)
def test_bad_urgency_is_refused_by_name_and_leaves_nothing(rig, fields, param):
    with pytest.raises(BadRequest) as refused:
        ask(rig, "r", **fields)
    assert refused.value.param == param
    rig.core.check_invariants()
    assert rig.core.status().active_requests == 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"classes": (ClassConfig("standard"), ClassConfig("standard"))}, "twice"),
        ({"classes": (ClassConfig("Very Important"),)}, "name"),
        ({"classes": ()}, "default_class"),
        ({"default_class": "vip"}, "vip"),
        ({"refuse_late": "sometimes"}, "refuse_late"),
    ],
)
def test_bad_classes_are_refused_at_the_start(settings, what):
    with pytest.raises(ConfigError, match=what):
        RouterConfig(**settings)


# ---- order


def test_urgent_request_goes_before_others_that_wait(rig):
    for name, class_name in (("b", "batch"), ("s", "standard"), ("i", "interactive")):
        ask(rig, name, prompt=12, class_name=class_name)
    worker = rig.join("d0", "both", blocks=4)
    order = []
    for _ in range(3):
        (name,) = {attempt[0] for attempt in rig.live_on(worker)}
        order.append(name)
        rig.finish(name, worker)
    assert order[0] == "b", "it was alone in its flow, and its turn came with it"
    again = [("b2", "batch"), ("b3", "batch"), ("i2", "interactive"), ("i3", "interactive")]
    for name, class_name in again:
        ask(rig, name, prompt=12, class_name=class_name)
    (name,) = {attempt[0] for attempt in rig.live_on(worker)}
    assert name == "b2"
    rig.finish("b2", worker)
    (name,) = {attempt[0] for attempt in rig.live_on(worker)}
    assert name == "i2"


def test_prompts_wait_in_the_router_once_there_are_two_flows(rig):
    """What a worker has been sent it computes in its own order: a flood that is sent at once delays who comes later."""
    rig.join("d0", "both", blocks=10000)
    for number in range(10):
        ask(rig, f"alone-{number}", prompt=500, tenant="a")
    assert rig.core.status().queued_requests == 0
    ask(rig, "other", prompt=10, tenant="b")
    ask(rig, "flood", prompt=500, tenant="a")
    assert rig.core.status().queued_requests == 2


def test_large_request_without_room_is_not_passed_for_ever(rig):
    worker = rig.join("d0", "both", blocks=8)
    ask(rig, "first", prompt=16, tenant="a")
    ask(rig, "large", prompt=28, tenant="b")
    served = 0
    for number in range(60):
        ask(rig, f"small-{number}", prompt=4, tenant="a")
        if "first" not in rig.ends and number == 1:
            rig.finish("first", worker)
        open_names = [name for name, _ in rig.live_on(worker)]
        if "large" in open_names:
            break
        for name in open_names[:1]:
            first_token(rig, name)
            served += 1
    else:
        raise AssertionError("the large one starves")
    assert 0 < served <= 40


# ---- refusals


def test_forecast_refuses_what_would_come_too_late_and_says_when_to_come_again(rig):
    rig.join("d0", "both", blocks=1000)
    teach(rig)
    fill(rig, 4)
    with pytest.raises(TooManyRequests) as refused:
        ask(rig, "r", prompt=100, target_ttft_s=2.0)
    assert 1 <= refused.value.retry_after_s <= 60
    assert "target is 2 s" in str(refused.value)
    assert book(rig, "standard").refused == {"forecast": 1}
    rig.core.check_invariants()
    ask(rig, "patient", prompt=100, target_ttft_s=60.0)


def test_class_target_refuses_too_and_other_classes_are_let_in(make_rig):
    rig = make_rig(classes=CLASSES)
    rig.join("d0", "both", blocks=1000)
    teach(rig)
    fill(rig, 4)
    with pytest.raises(TooManyRequests):
        ask(rig, "r", prompt=100, class_name="interactive")
    ask(rig, "standard", prompt=100)
    ask(rig, "batch", prompt=100, class_name="batch")
    assert book(rig, "interactive").refused == {"forecast": 1}


def test_model_that_has_learned_nothing_refuses_nothing(rig):
    rig.join("d0", "both", blocks=10000)
    for number in range(50):
        ask(rig, f"r{number}", prompt=900, target_ttft_s=0.001)
    assert len(rig.ends) == 0


def test_idle_cluster_refuses_nothing(rig):
    rig.join("d0", "both", blocks=1000)
    teach(rig)
    ask(rig, "r", prompt=900, target_ttft_s=0.001)


def test_without_targets_nothing_is_refused_for_being_late(rig):
    rig.join("d0", "both", blocks=10000)
    teach(rig)
    for number in range(200):
        ask(rig, f"r{number}", prompt=900)


@pytest.mark.parametrize("mode", ["never", "always"])
def test_operator_decides_whether_the_routers_targets_refuse(make_rig, mode):
    rig = make_rig(refuse_late=mode, target_ttft_s=5.0)
    rig.join("d0", "both", blocks=1000)
    teach(rig)
    fill(rig, 2)
    if mode == "never":
        ask(rig, "r", prompt=800, target_ttft_s=0.5)
    else:
        with pytest.raises(TooManyRequests):
            ask(rig, "r", prompt=800)


def test_request_that_waited_too_long_ends_as_refused_before_anything_is_sent(rig):
    worker = rig.join("d0", "both", blocks=4)
    ask(rig, "holder", prompt=12)
    ask(rig, "r", prompt=12, target_ttft_s=2.0)
    rig.stay(1.5, worker)
    assert "r" not in rig.ends
    rig.stay(1.0, worker)
    assert isinstance(rig.ends["r"].error, TooManyRequests)
    assert "waited" in str(rig.ends["r"].error)
    assert book(rig, "standard").refused == {"late": 1}
    assert "holder" not in rig.ends


def test_request_is_not_late_while_no_worker_could_take_it(rig):
    ask(rig, "r", target_ttft_s=0.5)
    rig.wait(5)
    assert rig.ends == {}
    worker = rig.join("d0", "both")
    rig.finish("r", worker)
    assert rig.ends["r"].error is None


def test_retried_request_is_never_late(rig):
    worker = rig.join("d0", "both", blocks=4)
    ask(rig, "r", prompt=12, target_ttft_s=1.0)
    rig.failed(retriable=True)
    rig.stay(3, worker)
    assert rig.ends == {}


def test_queued_tokens_have_a_bound_that_one_alone_may_pass(make_rig):
    rig = make_rig(max_queued_tokens=100)
    rig.join("d0", "both", blocks=1000)
    ask(rig, "large", prompt=500)
    with pytest.raises(TooManyRequests, match="the bound is 100"):
        ask(rig, "r", prompt=10)
    first_token(rig, "large")
    ask(rig, "r", prompt=10)
    assert book(rig, "standard").refused == {"queued_tokens": 1}


def test_promised_blocks_have_a_bound_and_are_given_back(make_rig):
    rig = make_rig(max_promised_blocks=10)
    rig.join("d0", "both", blocks=1000)
    ask(rig, "one", prompt=20, max_tokens=4)
    with pytest.raises(TooManyRequests, match="KV blocks"):
        ask(rig, "two", prompt=20, max_tokens=4)
    first_token(rig, "one")
    ask(rig, "two", prompt=20, max_tokens=4)


def test_older_bounds_answer_as_before_and_are_counted(make_rig):
    rig = make_rig(max_queued_requests=1)
    ask(rig, "one")
    with pytest.raises(Overloaded):
        ask(rig, "two", class_name="batch")
    assert book(rig, "batch").refused == {"queued": 1}
    rig = make_rig(max_active_requests=1)
    ask(rig, "one")
    with pytest.raises(Overloaded):
        ask(rig, "two")
    assert book(rig, "standard").refused == {"active": 1}


# ---- targets


def test_kept_and_missed_targets_are_counted(rig):
    rig.join("d0", "both")
    ask(rig, "kept", target_ttft_s=1.0, target_tpot_s=0.1, max_tokens=2)
    first_token(rig, "kept", is_last=False)
    rig.clock.advance(0.05)
    rig.out(1, request_id="kept", end="length")
    ask(rig, "missed", target_ttft_s=1.0, target_tpot_s=0.1, max_tokens=2)
    rig.clock.advance(1.5)
    first_token(rig, "missed", is_last=False)
    rig.clock.advance(0.2)
    rig.out(1, request_id="missed", end="length")
    found = book(rig, "standard")
    assert (found.ttft_met, found.ttft_missed, found.tpot_met, found.tpot_missed) == (1, 1, 1, 1)


def test_decision_names_the_class(rig):
    rig.join("d0", "both")
    ask(rig, "r", class_name="batch")
    rig.beat(rig.key("d0"))
    first_token(rig, "r")
    assert rig.events["r"][0].decision.class_name == "batch"


# ---- arithmetic


@pytest.mark.parametrize(
    ("waits", "seconds", "level"),
    [([], 3.0, 0.0), ([2.0], 0.0, 2.0), ([0.0, 4.0], 1.0, 1.0), ([0.0, 4.0], 6.0, 5.0), ([1.0, 1.0, 9.0], 2.0, 2.0)],
)
def test_work_fills_up_the_freest_workers_first(waits, seconds, level):
    assert even_level(waits, seconds) == pytest.approx(level)


def test_accuracy_follows_what_is_measured_within_bounds():
    accuracy = Accuracy()
    assert accuracy.ratio == 1.0
    for _ in range(100):
        accuracy.learn(1.0, 1.5)
    assert accuracy.ratio == pytest.approx(1.5, rel=0.05)
    for _ in range(200):
        accuracy.learn(0.1, 100.0)
    assert accuracy.ratio == 4.0
