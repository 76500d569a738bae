"""The metrics of request classes: who waits, who was refused and why, whose targets were kept."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..router.interface import ClassStatus


def class_metrics(classes: list[ClassStatus]) -> Iterator[Metric]:
    """Read from the router's status at each scrape."""
    queued = GaugeMetricFamily(
        "penstock_class_queued_requests", "Requests of a class that wait for a worker", labels=["class"]
    )
    refused = CounterMetricFamily(
        "penstock_refused_requests", "Requests refused before their first token", labels=["class", "reason"]
    )
    kept = CounterMetricFamily(
        "penstock_target_requests",
        "Served requests with a target, by whether it was met",
        labels=["class", "of", "result"],
    )
    for one in classes:
        queued.add_metric([one.name], float(one.queued))
        for reason, count in sorted(one.refused.items()):
            refused.add_metric([one.name, reason], float(count))
        counts = (
            ("ttft", "met", one.ttft_met),
            ("ttft", "missed", one.ttft_missed),
            ("tpot", "met", one.tpot_met),
            ("tpot", "missed", one.tpot_missed),
        )
        for of, result, count in counts:
            kept.add_metric([one.name, of, result], float(count))
    yield queued
    yield refused
    yield kept
