"""What the router decided and expected: in the metrics, and which conversation it is told about."""

from __future__ import annotations

from types import SimpleNamespace

from penstock.gateway.metrics import GatewayMetrics
from penstock.gateway.requests import session_key
from penstock.gateway.timing import RequestTiming
from penstock.router.interface import ClusterStatus, Decision
from penstock.testing.clock import FakeClock


def test_forecast_errors_are_counted_by_what_they_are_of() -> None:
    clock = FakeClock()
    timing = RequestTiming(clock, clock.now())
    timing.mark_submitted()
    clock.advance(2.0)
    timing.mark_tokens(1, None)
    clock.advance(0.1)
    timing.mark_tokens(1, None)
    router = SimpleNamespace(status=lambda: ClusterStatus(True, "", "auto", [], 0, 0))
    metrics = GatewayMetrics(router)
    metrics.predicted(Decision("auto", "d", None, 1.0, 0.1, 0.0, 1.0, 0.0), timing)
    text = metrics.render().decode()
    assert 'penstock_forecast_error_ratio_sum{of="ttft"} 0.5' in text
    assert 'penstock_forecast_error_ratio_count{of="tpot"} 1.0' in text
    assert 'penstock_placements_total{policy="auto",prefill="local"} 1.0' in text


def test_session_is_the_client_s_within_its_tenant() -> None:
    assert session_key("t", "", None) == session_key("t", "", "") == ""
    assert session_key("t", "a", "b") == session_key("t", "a", None) != session_key("t", "b", None)
    assert session_key("t", "", "a") == session_key("t", "a", None) != session_key("u", "a", None)
    assert session_key("ta", "b", None) != session_key("t", "ab", None)
    assert len(session_key("t", "x" * 100_000, None)) == 32
    assert session_key("t", "\ud800", None)
