"""OpenTelemetry traces (the `otel` extra): one server span per request, and its queue, prefill and decode below it.

Spans are made when a request has ended, from times that are kept anyway, so that nothing stands between a stream and its
client. (The ASGI instrumentation of OpenTelemetry wraps every `send`, and knows nothing of what happens in a request.)
They never hold what was asked or answered. Everything but the endpoint is set by the standard OTEL_* variables.
"""

import threading
import time
from collections import Counter
from itertools import accumulate

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Scope

import sortserve
from sortserve.server.metrics import Served
from sortserve.server.record import Record

_TRACES_PATH = "/v1/traces"
_LAST_SPANS_SECONDS = 3.0  # at the end: less than an orchestrator waits, where the exporter would try for 10
_MAX_PATH_CHARS = 200


class Tracing:
    """Makes the spans of requests."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sortserve", sortserve.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Spans go to an OTLP collector over HTTP, in batches, from a thread. `endpoint` is its base URL."""
        resource = Resource.create({"service.name": "sortserve", "service.version": sortserve.__version__})
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
        provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + _TRACES_PATH)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """Send what is left; give up on a collector that does not answer in time."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_LAST_SPANS_SECONDS)

    def request(self, scope: Scope, record: Record, served: Served | None, now: float) -> None:
        """The spans of a request that has ended at `now`."""
        clock = _EpochClock()
        headers = Headers(scope=scope)
        parent = self._propagator.extract({name: headers.get(name, "") for name in ("traceparent", "tracestate")})
        route = getattr(scope.get("route"), "path", None)  # not the path: what clients make up names no span
        name = scope["method"] if route is None else f"{scope['method']} {route}"
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=clock.nanoseconds(record.started))
        if span.is_recording():
            span.set_attributes(
                {
                    "http.request.method": scope["method"],
                    "http.response.status_code": record.status,
                    "url.path": scope["path"][:_MAX_PATH_CHARS],
                    "sortserve.request_id": record.request_id,
                }
            )
            if route is not None:
                span.set_attribute("http.route", route)
            if served is not None and record.generation is not None:
                span.set_attributes(_generation_attributes(record, served))
                self._phases(span, record, served, clock)
            failed = served is not None and served.finish_reason == "error"
            if record.status >= 500 or failed:
                span.set_attribute("error.type", str(record.status) if record.status >= 500 else "engine")
                span.set_status(Status(StatusCode.ERROR))
        span.end(clock.nanoseconds(now))

    def _phases(self, span: Span, record: Record, served: Served, clock: "_EpochClock") -> None:
        """Queue, prefill and decode, as far as the request came."""
        if served.queue is None:
            return
        below = trace.set_span_in_context(span)
        bounds = [record.arrival, record.arrival + served.queue]
        if served.time_to_first_token is not None:
            bounds.append(record.arrival + served.time_to_first_token)
            assert record.generation is not None
            bounds.append(max(answer.last_time or 0.0 for answer in record.generation.answers))
        times = [clock.nanoseconds(bound) for bound in accumulate(bounds, max)]
        for name, begin, end in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            self._tracer.start_span(name, below, start_time=begin).end(end)


class _EpochClock:
    """Turns times of `time.monotonic()` into nanoseconds since 1970."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, monotonic_seconds: float) -> int:
        """The same moment, for a span."""
        return int(monotonic_seconds * 1e9) + self._offset


def _generation_attributes(record: Record, served: Served) -> dict[str, AttributeValue]:
    """What the GenAI conventions name, and what is ours."""
    assert record.generation is not None
    job, answers = record.generation.job, record.generation.answers
    sampling, budget = job.sampling, job.terms.budget
    submodels: Counter[str] = Counter()
    for answer in answers:
        submodels.update(answer.submodels)
    told: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": "chat" if job.endpoint == "chat" else "text_completion",
        "gen_ai.provider.name": "sortserve",
        "gen_ai.request.model": job.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": job.num_choices if job.num_choices > 1 else None,
        "gen_ai.response.id": job.id,
        "gen_ai.response.finish_reasons": [answer.finish_reason or served.finish_reason for answer in answers],
        "gen_ai.usage.input_tokens": job.num_prompt_tokens,
        "gen_ai.usage.output_tokens": submodels.total(),
        "sortserve.submodels": list(submodels),
        "sortserve.submodel_tokens": list(submodels.values()),
        "sortserve.switches": sum(answer.switches for answer in answers),
        "sortserve.budget_ms": None if budget is None else budget.total_ms,
        "sortserve.budget_policy": served.policy,
        "sortserve.predicted_ms": None if served.predicted is None else served.predicted * 1e3,
        "sortserve.met": None if served.outcome is None else served.outcome == "met",
    }
    return {name: value for name, value in told.items() if value is not None}
