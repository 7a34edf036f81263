"""GET /metrics: the engine's totals and the latencies that clients see, as Prometheus text."""

import bisect
import itertools
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nanodeploy.wire import Stats

SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
LONG_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Histogram:
    """Counts per bucket. Prometheus' own takes a lock per observation, and there is one per token."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


class Latencies:
    """What the front end measures, per sequence, in seconds."""

    def __init__(self) -> None:
        self.first_token = Histogram(LONG_SECONDS)
        self.between_tokens = Histogram(SECONDS)
        self.per_token = Histogram(SECONDS)
        self.whole_request = Histogram(LONG_SECONDS)
        self.finished: dict[str, int] = {}  # finish reason -> sequences


class _Collector:
    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def exposition(model: str, stats: Stats, latencies: Latencies, is_up: bool) -> bytes:
    """The text of /metrics. Names are those of vLLM's dashboards, with the prefix nanodeploy:."""
    used = (stats.num_pages - stats.num_free_pages) / stats.num_pages if stats.num_pages else 0.0
    metrics: list[Metric] = []

    def gauge(name: str, help: str, value: float) -> None:
        family = GaugeMetricFamily(f"nanodeploy:{name}", help, labels=["model_name"])
        family.add_metric([model], value)
        metrics.append(family)

    def counter(name: str, help: str, value: float) -> None:
        family = CounterMetricFamily(f"nanodeploy:{name}", help, labels=["model_name"])
        family.add_metric([model], value)
        metrics.append(family)

    def histogram(name: str, help: str, values: Histogram) -> None:
        family = HistogramMetricFamily(f"nanodeploy:{name}", help, labels=["model_name"])
        family.add_metric([model], buckets=values.buckets(), sum_value=values.sum)
        metrics.append(family)

    gauge("engine_up", "1 while the engine's loop gives signs of life.", float(is_up))
    gauge("num_requests_running", "Sequences in the running batch.", stats.num_running)
    gauge("num_requests_waiting", "Sequences that wait to run.", stats.num_waiting)
    gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", used)
    counter("num_preemptions", "Sequences set back to waiting for want of pages.", stats.num_preemptions)
    counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries)
    counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits)
    counter("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
    counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
    counter("iterations", "Steps of the engine.", stats.num_steps)
    histogram("time_to_first_token_seconds", "From arrival to the first token.", latencies.first_token)
    histogram("inter_token_latency_seconds", "Between tokens of a sequence.", latencies.between_tokens)
    histogram("request_time_per_output_token_seconds", "Mean after the first token.", latencies.per_token)
    histogram("e2e_request_latency_seconds", "From arrival to the end.", latencies.whole_request)
    success = CounterMetricFamily(
        "nanodeploy:request_success", "Sequences that ended, by reason.", labels=["model_name", "finished_reason"]
    )
    for reason in sorted({"stop", "length", "abort", "error"} | latencies.finished.keys()):
        success.add_metric([model, reason], latencies.finished.get(reason, 0))
    metrics.append(success)
    registry = CollectorRegistry()
    registry.register(_Collector(metrics))
    return generate_latest(registry)
