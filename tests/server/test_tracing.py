"""Traces: one tree of spans per request, in memory and through a collector's socket."""

import asyncio
import http.server
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sortserve.engine.errors import StartupError
from sortserve.engine.protocol import FailedEvent
from sortserve.server.app import create_app
from sortserve.server.serve import open_tracing
from sortserve.server.tracing import Tracing
from tests.server.fake_backend import FakeBackend, byte_tokenizer

SRC = Path(__file__).resolve().parents[2] / "src"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ASK = {"prompt": "SECRET", "max_tokens": 5, "latency_budget_ms": 60_000}


@asynccontextmanager
async def traced(backend: FakeBackend, tracing: Tracing) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend, byte_tokenizer(), tracing=tracing)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        while app.state.server.phase == "loading":
            await asyncio.sleep(0)
        yield client


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(memory: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Tracing(provider)


def span_named(memory: InMemorySpanExporter, name: str) -> ReadableSpan:
    [found] = [span for span in memory.get_finished_spans() if span.name == name]
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_one_tree_per_request(stream: bool, memory: InMemorySpanExporter, tracing: Tracing) -> None:
    backend = FakeBackend(submodels=("d4", "d4", "d2"), delay=0.005)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r-1"}
    async with traced(backend, tracing) as client:
        answer = await client.post("/v1/completions", json=ASK | {"stream": stream, "seed": 3}, headers=headers)
        assert answer.status_code == 200
        spans = memory.get_finished_spans()
    assert len(spans) == 4  # none of the probes
    server = span_named(memory, "POST /v1/completions")
    assert server.kind == SpanKind.SERVER
    assert server.context is not None
    assert server.parent is not None
    assert (f"{server.context.trace_id:032x}", f"{server.parent.span_id:016x}") == (TRACE, PARENT)
    told = dict(server.attributes or {})
    assert told.pop("gen_ai.response.id") == backend.requests[0].request_id.rpartition("-")[0]
    assert told.pop("sortserve.predicted_ms") == 250.0
    assert told == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "sortserve.request_id": "r-1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "sortserve",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 5,
        "sortserve.submodels": ("d4", "d2"),
        "sortserve.submodel_tokens": (4, 1),
        "sortserve.switches": 2,
        "sortserve.budget_ms": 60_000.0,
        "sortserve.budget_policy": "best-effort",
        "sortserve.met": True,
    }
    assert "SECRET" not in "".join(span.to_json() for span in spans)
    assert server.status.status_code == StatusCode.UNSET
    phases = [span_named(memory, name) for name in ("queue", "prefill", "decode")]
    assert {phase.parent.span_id for phase in phases if phase.parent is not None} == {server.context.span_id}
    times = [time for phase in phases for time in (phase.start_time or 0, phase.end_time or 0)]
    assert times == sorted(times)
    assert times[1:5:2] == times[2:6:2], "each phase begins where the one before it ends"
    assert (server.start_time or 0) <= times[0]
    assert times[-1] <= (server.end_time or 0)
    assert times[1] - times[0] == pytest.approx(1e6, abs=1e3), "the back end said that it queued for 1 ms"


async def test_requests_that_fail(memory: InMemorySpanExporter, tracing: Tracing) -> None:
    async with traced(FakeBackend(fail_after=2), tracing) as client:
        await client.post("/v1/completions", json=ASK)
        whole = memory.get_finished_spans()[-1]
        memory.clear()
        await client.post("/v1/completions", json=ASK | {"stream": True})
        streamed = span_named(memory, "POST /v1/completions")
        memory.clear()
        await client.post("/v1/completions", json={"prompt": ""})
        await client.get("/SECRET-path")
    refused, missing = memory.get_finished_spans()
    assert whole.status.status_code == streamed.status.status_code == StatusCode.ERROR
    assert (whole.attributes or {})["error.type"] == "503"
    assert (streamed.attributes or {})["error.type"] == "engine"
    assert refused.status.status_code == missing.status.status_code == StatusCode.UNSET  # the client's fault
    assert (missing.name, (missing.attributes or {})["http.response.status_code"]) == ("GET", 404)


async def test_refused_by_the_engine_has_no_phases(memory: InMemorySpanExporter, tracing: Tracing) -> None:
    async with traced(FakeBackend(refuse=FailedEvent("", "OverloadedError", "full")), tracing) as client:
        await client.post("/v1/completions", json=ASK, headers={"traceparent": "nonsense"})
    [span] = memory.get_finished_spans()
    assert span.parent is None
    assert (span.attributes or {})["gen_ai.usage.output_tokens"] == 0


async def test_not_sampled_is_not_recorded(memory: InMemorySpanExporter, tracing: Tracing) -> None:
    async with traced(FakeBackend(), tracing) as client:
        await client.post("/v1/completions", json=ASK, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert memory.get_finished_spans() == ()


# --- a collector


class _Collector(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    received: list[tuple[str, bytes]] = []
    handler = type("Collector", (_Collector,), {"received": received})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", received
    server.shutdown()
    thread.join()
    server.server_close()


async def test_spans_reach_a_collector(
    collector: tuple[str, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the app sends what is left; the standard variables name the service."""
    endpoint, received = collector
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracing = open_tracing(endpoint)
    assert tracing is not None
    async with traced(FakeBackend(), tracing) as client:
        await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "SECRET"}]})
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = ExportTraceServiceRequest.FromString(received[0][1])
    resource = {item.key: item.value.string_value for item in sent.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("sortserve", "test")
    spans = sent.resource_spans[0].scope_spans[0].spans
    assert sorted(span.name for span in spans) == ["POST /v1/chat/completions", "decode", "prefill", "queue"]
    assert b"SECRET" not in received[0][1]


def test_off_by_default() -> None:
    assert open_tracing(None) is None


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sortserve.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"pip install 'sortserve\[otel\]'"):
        open_tracing("http://127.0.0.1:4318")


def test_the_server_needs_no_opentelemetry() -> None:
    """Nothing but the tracing file imports it: without the flag it costs nothing, installed or not."""
    code = "import sys, sortserve.server.serve, sortserve.server.cli; print('opentelemetry.sdk' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)})
    assert ran.stdout.strip() == "False", ran.stderr
