"""`--metrics-compat vllm`: the series that routers and dashboards made for vLLM read, from what is counted anyway.

Nothing is observed twice: the histograms are those of `metrics.py`, summed over sub-models.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from sortserve.engine.protocol import EngineInfo, EngineStats

_LABELS = ["model_name"]
NO_SUBMODEL = "none"  # of requests that were refused, which vLLM does not time

EngineView = Callable[[], tuple[EngineInfo | None, EngineStats]]


class VllmCollector(Collector):
    """vLLM's names for the engine's state and for the three latencies."""

    def __init__(self, engine: EngineView, first: Histogram, per_token: Histogram, duration: Histogram) -> None:
        self._engine = engine
        self._histograms = (
            ("time_to_first_token_seconds", "Time to the first token", first),
            ("request_time_per_output_token_seconds", "Mean time per output token of a request", per_token),
            # vLLM's newer and older name for the time between two tokens; one value per request here, its mean
            ("inter_token_latency_seconds", "Time between two tokens: the mean of each request", per_token),
            ("time_per_output_token_seconds", "The same, as it was called before", per_token),
            ("e2e_request_latency_seconds", "End to end time of a request", duration),
        )

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry then asks for no values before there are any."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All families, the engine's with zeros where it is not up."""
        info, stats = self._engine()
        model = "" if info is None else info.model
        usage = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that hold K/V", stats.running),
            ("num_requests_waiting", "Requests in the queue", stats.waiting),
            ("kv_cache_usage_perc", "Share of the K/V in use, 0 to 1", usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric([model], value)
            yield gauge
        cache = InfoMetricFamily("vllm:cache_config", "Size of the K/V memory, in blocks of all layers", labels=_LABELS)
        blocks, size = (0, 0) if info is None else (info.kv_blocks, info.block_tokens)
        cache.add_metric([model], {"block_size": str(size), "num_gpu_blocks": str(blocks)})
        yield cache
        for name, text, histogram in self._histograms:
            yield _summed(HistogramMetricFamily(f"vllm:{name}", text, labels=_LABELS), model, histogram)


def _summed(family: HistogramMetricFamily, model: str, histogram: Histogram) -> HistogramMetricFamily:
    """The observations of all sub-models as one series."""
    buckets: Counter[str] = Counter()  # cumulative, as they are in a histogram's samples
    total = 0.0
    for metric in histogram.collect():
        for sample in metric.samples:
            if sample.labels["submodel"] == NO_SUBMODEL:
                continue
            if sample.name.endswith("_bucket"):
                buckets[sample.labels["le"]] += int(sample.value)
            elif sample.name.endswith("_sum"):
                total += sample.value
    if buckets:
        family.add_metric([model], [*sorted(buckets.items(), key=lambda item: float(item[0]))], total)
    return family
