"""Our figures on the `/metrics` of a user's own vLLM server: what the scheduler reports, in Prometheus' text format.

The scheduler is another process and pushes complete reports to an address (`engine/vllm/reporting.py`); the last one is kept
here and rendered when it is asked for. Labels are closed sets: the model, ids of its ladder, reasons. Imports no vLLM.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
import zmq
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Report = Mapping[str, Any]
_Family = tuple[str, str, dict[tuple[str, ...], float], list[str]]  # name, text, values by label values, labels


class Reports(Collector):
    """The last report that came to `address`. Raises zmq.ZMQError if somebody else listens there."""

    def __init__(self, address: str, model: str) -> None:
        self._model = model
        self._last: Report = {}
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.CONFLATE, 1)  # the others are older and say less
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def close(self) -> None:
        """Nobody listens any more."""
        self._socket.close()

    def render(self) -> bytes:
        """All families as text; none before the first report."""
        with contextlib.suppress(zmq.Again):  # no step has ended since
            self._last = msgspec.msgpack.decode(self._socket.recv(zmq.NOBLOCK))
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the registry then asks for no values before there are any."""
        return []

    def collect(self) -> list[Metric]:
        """The families."""
        last = self._last
        if not last:
            return []
        gauges: tuple[_Family, ...] = (
            ("requests_running", "Sequences that hold blocks", {(): last["running"]}, []),
            ("requests_waiting", "Requests in the queue", {(): last["waiting"]}, []),
            ("kv_cache_usage_ratio", "Share of the K/V blocks in use", {(): last["kv_usage"]}, []),
            (
                "step_time_error_ratio",
                "Median of |measured / predicted - 1| over the last steps",
                _errors(last),
                ["kind"],
            ),
        )
        counters: tuple[_Family, ...] = (
            ("steps", "Steps that ran", {(): last["steps"]}, []),
            ("refilled_tokens", "Tokens computed again for a deeper sub-model", {(): last["recomputed_tokens"]}, []),
            ("generation_tokens", "Output tokens", _keyed(last["generated_tokens"]), ["submodel"]),
            ("submodel_selected", "Choices of a sub-model, and why", _pairs(last["selected"]), ["submodel", "reason"]),
            ("submodel_switches", "Changes within an answer", _keyed(last["switches"]), ["direction"]),
            ("requests_dropped", "Requests refused or cut", _keyed(last["dropped"]), ["reason"]),
        )
        found: list[Metric] = []
        for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, values, labels in families:
                family = kind(f"sortserve_{name}", text, labels=["model", *labels])
                for key, value in values.items():
                    family.add_metric([self._model, *key], value)
                found.append(family)
        return found


def _keyed(counts: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(key,): count for key, count in counts.items()}


def _pairs(counts: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    """Of "id reason"; ids may have blanks, reasons have none."""
    return {tuple(names.rsplit(" ", 1)): count for names, count in counts.items()}


def _errors(report: Report) -> dict[tuple[str, ...], float]:
    errors = report.get("decider", {}).get("errors", {})
    return {(kind,): median for kind, (_, median, _) in errors.items()}
