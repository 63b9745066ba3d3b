"""What Prometheus reads at /metrics: how long requests wait, how fast tokens come, how full the cache is, how requests end.

Each application has a registry of its own, so that two in one process (the tests, a notebook) do not add up.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
GAUGES = {  # field of the engine's statistics → what it is called and says
    "waiting": ("headspring_requests_waiting", "Requests that wait for a place in the batch"),
    "running": ("headspring_requests_running", "Sequences that are being computed"),
    "pages_used": ("headspring_cache_pages_used", "Pages of the key-value cache in use"),
    "pages_total": ("headspring_cache_pages", "Pages of the key-value cache"),
    "snapshots": ("headspring_snapshots", "States of layers without pages that prefixes may begin with"),
    "snapshot_bytes": ("headspring_snapshot_bytes", "Memory of these"),
}
COUNTERS = {
    "steps": ("headspring_engine_steps", "Steps of the engine"),
    "tokens": ("headspring_engine_tokens", "Tokens that were sampled"),
    "computed_tokens": ("headspring_engine_computed_tokens", "Tokens that went through the model, prompts included"),
    "prefix_hits": ("headspring_prefix_hit_tokens", "Prompt tokens that the prefix cache had"),
    "proposed": ("headspring_speculation_proposed_tokens", "Tokens that speculation proposed and the model checked"),
    "accepted": ("headspring_speculation_accepted_tokens", "Proposed tokens that were right"),
    "speculation_off": ("headspring_speculation_switched_off", "Times that proposing was given up because it did not pay"),
    "preemptions": ("headspring_preemptions", "Sequences put back because pages ran out"),
}
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.outcomes = Counter("headspring_requests", "Requests by how they ended", ["model", "outcome"], registry=registry)
        self.rejects = Counter("headspring_rejects", "Requests turned away, by reason", ["reason"], registry=registry)
        self.generated = Counter("headspring_generated_tokens", "Tokens of answers", ["model"], registry=registry)
        self.prompts = Counter("headspring_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.first = Histogram(
            "headspring_time_to_first_token_seconds", "From submission to the first token", ["model"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.each = Histogram(
            "headspring_time_per_token_seconds", "Between tokens of one answer, its mean", ["model"],
            buckets=TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self.whole = Histogram(
            "headspring_request_seconds", "From submission to the end", ["model"], buckets=SECONDS, registry=registry
        )

    def reject(self, reason: str) -> None:
        self.rejects.labels(reason).inc()

    def watch(self, statistics: Callable[[], Mapping[str, Any]]) -> None:
        """Read the engines' own statistics, by name of the model, whenever somebody asks."""
        self.registry.register(_Engines(statistics))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    def __init__(self, statistics: Callable[[], Mapping[str, Any]]):
        self.statistics = statistics

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model, stats in self.statistics().items():
            for names, kind in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
                for field, (name, text) in names.items():
                    if (value := getattr(stats, field, None)) is not None:
                        family = families.setdefault(name, kind(name, text, labels=["model"]))
                        family.add_metric([model], value)  # type: ignore[attr-defined]
        yield from families.values()
