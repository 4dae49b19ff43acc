"""Prometheus metrics, prefix `sortserve_`: what the HTTP side counts itself, and the engine's own counters as of now.

Labels are closed sets: the model, ids of its ladder (`none` before one was chosen), endpoints by name. Never a user, a
raw budget or anything else a client can make up.
"""

import platform
from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import sortserve
from sortserve.engine.protocol import EngineInfo, EngineStats
from sortserve.server.vllm_metrics import NO_SUBMODEL, VllmCollector

# 1 ms to 10 minutes in steps of about 2
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 600.0)
# most of a ladder's rungs lie near 1, and so do the answers that mix them
QUALITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999, 1.0)
RATIOS = (-4.0, -2.0, -1.0, -0.5, -0.25, -0.1, -0.05, 0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
NO_BUDGET = "no-budget"  # the outcome of a request that had none to keep


@dataclass(frozen=True, slots=True)
class Served:
    """One generation request as it ended, for the metrics. Times in seconds; None where there was none."""

    endpoint: str
    status: int
    finish_reason: str  # stop, tool_calls, length, abort, error or none (refused)
    duration: float
    submodel: str = NO_SUBMODEL
    policy: str | None = None  # of the budget; None without one
    outcome: str | None = None  # met, missed or refused; None without a budget
    budget: float | None = None  # total
    predicted: float | None = None
    queue: float | None = None
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None
    elapsed: float | None = None  # arrival to last token
    tokens: Mapping[str, int] = field(default_factory=dict)  # of a complete answer, by sub-model; else empty


class Metrics:
    """All metrics of one app, in a registry of its own; with `vllm` under the names of vLLM too."""

    def __init__(self, *, vllm: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self._model = ""
        registry = self.registry
        registry.register(self._engine)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            labels = ("model", "submodel")
            return Histogram(f"sortserve_{name}", text, labels, buckets=buckets, registry=registry)

        labels = ("model", "submodel", "endpoint", "status", "finish_reason")
        self._requests = Counter("sortserve_requests", "Requests that ended", labels, registry=registry)
        asked = ("model", "submodel", "outcome", "policy")
        self._budgets = Counter("sortserve_budget_requests", "Requests with a budget", asked, registry=registry)
        self._first = histogram("time_to_first_token_seconds", "From the last byte of the request to the first token")
        self._per_token = histogram("time_per_output_token_seconds", "Mean over the tokens after the first")
        self._duration = histogram("request_duration_seconds", "From the last byte of the request to the answer's")
        self._queue = histogram("request_queue_seconds", "Until the request's first row ran")
        self._budget = histogram("budget_seconds", "Total budgets, as applied")
        self._slack = histogram("budget_slack_ratio", "(budget - time taken) / budget; below 0 is late", RATIOS)
        self._error = histogram("latency_prediction_error_ratio", "(predicted - taken) / taken", RATIOS)
        self._quality = Histogram(
            "sortserve_quality_ratio",
            "Quality of complete answers, 1 is the full model's: the ladder's, averaged over an answer's tokens",
            ("model", "outcome"),
            buckets=QUALITIES,
            registry=registry,
        )
        self._goodput = Counter(
            "sortserve_goodput",
            "Quality of the answers that met their budget, summed: its rate is the goodput",
            ("model", "submodel"),
            registry=registry,
        )
        if vllm:
            registry.register(VllmCollector(self._engine.view, self._first, self._per_token, self._duration))

    def describe(self, info: EngineInfo) -> None:
        """Tell what is served, once it is loaded."""
        self._model = info.model
        self._engine.info = info

    def drop(self, reason: str) -> None:
        """Count a request that the HTTP side refused before the engine saw it."""
        self._engine.dropped[reason] += 1

    def observe(self, served: Served) -> None:
        """Count one request that ended."""
        model, submodel = self._model, served.submodel
        self._requests.labels(model, submodel, served.endpoint, str(served.status), served.finish_reason).inc()
        if served.outcome is not None and served.policy is not None:
            self._budgets.labels(model, submodel, served.outcome, served.policy).inc()
        self._duration.labels(model, submodel).observe(served.duration)
        for histogram, value in (
            (self._first, served.time_to_first_token),
            (self._per_token, served.time_per_output_token),
            (self._queue, served.queue),
            (self._budget, served.budget),
        ):
            if value is not None:
                histogram.labels(model, submodel).observe(value)
        if served.elapsed is not None and served.budget is not None:
            self._slack.labels(model, submodel).observe((served.budget - served.elapsed) / served.budget)
        if served.elapsed is not None and served.predicted is not None and served.elapsed > 0:
            self._error.labels(model, submodel).observe((served.predicted - served.elapsed) / served.elapsed)
        self._observe_quality(served)

    def _observe_quality(self, served: Served) -> None:
        """What the answer was worth. Nothing for a request that was refused or not finished: that is worth nothing, and
        `budget_requests` tells how many there were."""
        ladder = None if self._engine.info is None else self._engine.info.ladder
        quality = None if ladder is None else ladder.mean_quality(served.tokens)
        if quality is None:
            return
        self._quality.labels(self._model, served.outcome or NO_BUDGET).observe(quality)
        if served.outcome == "met":
            self._goodput.labels(self._model, served.submodel).inc(quality)

    def take(self, stats: EngineStats | None, *, ready: bool, restarts: int) -> None:
        """The engine as of now. `stats` None: there is none, or where one is `ready` it was too busy to answer; then its
        last ones stay, since zeros would be taken for a reset."""
        if stats is not None or not ready:
            self._engine.stats = stats
        self._engine.ready, self._engine.restarts = ready, restarts

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition, in the format that `accept` prefers, and its type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _EngineCollector(Collector):
    """The engine's counters: it keeps them itself, so they are read, not counted along."""

    def __init__(self) -> None:
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.ready = False
        self.restarts = 0
        self.dropped: Tally[str] = Tally()

    def view(self) -> tuple[EngineInfo | None, EngineStats]:
        """What is known of the engine."""
        return self.info, self.stats or EngineStats()

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry then asks for no values before there are any."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All families, with zeros where the engine is not up."""
        stats = self.stats or EngineStats()
        model = self.info.model if self.info is not None else ""
        build = InfoMetricFamily("sortserve_build", "What is running")
        build.add_metric([], {"version": sortserve.__version__, "python": platform.python_version()})
        yield build
        pages = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
        for name, text, value in (
            ("requests_running", "Sequences that hold pages", stats.running),
            ("requests_waiting", "Requests in the queue", stats.waiting),
            ("kv_cache_usage_ratio", "Share of the K/V pages in use", pages),
            ("model_ready", "1 once requests are taken", float(self.ready)),
            ("model_load_seconds", "Time to load and warm up", self.info.load_seconds if self.info else 0.0),
        ):
            gauge = GaugeMetricFamily(f"sortserve_{name}", text, labels=["model"])
            gauge.add_metric([model], value)
            yield gauge
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens computed or found", stats.prompt_tokens),
            ("refilled_tokens", "Tokens whose deeper K/V were computed later", stats.refilled_tokens),
            ("preemptions", "Sequences that lost their pages for a while", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found", stats.prefix_hits),
            ("engine_restarts", "Engines started after the first one", self.restarts),
        ):
            counter = CounterMetricFamily(f"sortserve_{name}", text, labels=["model"])
            counter.add_metric([model], count)
            yield counter
        yield from self._labelled(stats, model)
        yield from self._step_times(stats, model)

    def _step_times(self, stats: EngineStats, model: str) -> Iterator[Metric]:
        """How well the last steps were predicted, by kind."""
        error = GaugeMetricFamily(
            "sortserve_step_time_error_ratio",
            "Median of |measured / predicted - 1| over the last steps",
            labels=["model", "kind"],
        )
        covered = GaugeMetricFamily(
            "sortserve_step_time_p90_coverage_ratio",
            "Share of the last steps that took no longer than their predicted p90",
            labels=["model", "kind"],
        )
        for kind, (_, median, coverage) in stats.step_errors.items():
            error.add_metric([model, kind], median)
            covered.add_metric([model, kind], coverage)
        yield error
        yield covered

    def _labelled(self, stats: EngineStats, model: str) -> Iterator[Metric]:
        dropped = self.dropped + Tally(stats.dropped)
        for name, text, labels, values in (
            ("generation_tokens", "Output tokens", ["submodel"], _keyed(stats.generated_tokens)),
            ("submodel_selected", "Choices of a sub-model, and why", ["submodel", "reason"], stats.selected),
            (
                "submodel_switches",
                "Changes within an answer",
                ["direction"],
                _keyed({"up": 0, "down": 0} | stats.switches),  # zeros: a rate needs a series before the first one
            ),
            ("requests_dropped", "Requests refused", ["reason"], _keyed(dropped)),
        ):
            counter = CounterMetricFamily(f"sortserve_{name}", text, labels=["model", *labels])
            for key, count in values.items():
                counter.add_metric([model, *key], count)
            yield counter


def _keyed(counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(key,): count for key, count in counts.items()}
