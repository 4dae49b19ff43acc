"""What surrounds every request: its id, its API key and rate, the size of its body, its arrival, and what is told of it:
log line, metrics and trace."""

import logging
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.engine import logs
from sortserve.engine.errors import AuthenticationError, RateLimitedError, SortServeError
from sortserve.server.body import check_json, read_body
from sortserve.server.console import PREFIX as CONSOLE_PREFIX
from sortserve.server.errors import error_response, internal_error_response
from sortserve.server.logs import prompt_fields, request_fields
from sortserve.server.record import CLIENT_GONE, REQUEST_ID, Record
from sortserve.server.state import ServerState
from sortserve.server.streams import ClientGoneError

if TYPE_CHECKING:
    from sortserve.server.tracing import Tracing  # needs the `otel` extra

_LOG = logging.getLogger("sortserve.server")
_ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}  # those that generate
_WITHOUT_KEY = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"})
_PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: not worth a line each
EXPOSED_HEADERS = (
    "X-Request-Id",
    "X-Submodel",
    "X-Latency-Budget-Ms",
    "X-Latency-Budget-TTFT-Ms",
    "X-Latency-Budget-TPOT-Ms",
    "X-Latency-Predicted-Ms",
    "X-Latency-Budget-Status",
    "Server-Timing",
    "Retry-After",
    "retry-after-ms",
    "X-Dropped-Reason",
)


class ContextMiddleware:
    """The outermost layer of the app. Nothing it catches reaches the client with a trace."""

    def __init__(self, app: ASGIApp, state: ServerState, tracing: "Tracing | None" = None) -> None:
        self._app = app
        self._state = state
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        usable = REQUEST_ID.fullmatch(given) is not None
        record = Record(given if usable else f"req-{uuid.uuid4().hex}", usable, started, started)
        former_id = logs.request_id.set(record.request_id)
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["X-Request-Id"] = record.request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")  # prompts and answers are nobody else's
                headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED_HEADERS)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            await self._serve(scope, receive, send_with_headers, record)
        except ClientGoneError:
            record.status = CLIENT_GONE
        except Exception:
            _LOG.exception("the request failed")
            if record.status:
                raise  # the response has begun: all that is left is to cut the connection
            await internal_error_response()(scope, receive, send_with_headers)
        finally:
            self._tell(scope, record, time.monotonic())
            logs.request_id.reset(former_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            self._check_key(scope, record)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                if scope["path"] in _ENDPOINTS:
                    self._state.backend.expect()
                receive = await self._read_body(scope, receive)
        except SortServeError as error:
            await error_response(error)(scope, receive, send)
            return
        record.arrival = time.monotonic()
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope, record: Record) -> None:
        """Find the request's key and count the request. Raises AuthenticationError where a key is needed and the one
        sent is none, RateLimitedError where it has been used too often."""
        keys = self._state.keys
        free = scope["path"] in _WITHOUT_KEY or scope["path"].startswith(CONSOLE_PREFIX)
        if keys.open or scope["method"] == "OPTIONS" or free:
            return
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        record.key = keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if record.key is None:
            raise AuthenticationError(
                "missing or unknown API key; send one header `Authorization: Bearer <key>`", param="Authorization"
            )
        if scope["method"] == "POST":
            try:
                record.key.spend()
            except RateLimitedError:
                self._state.metrics.drop("rate_limited")
                raise

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read and check the whole body, and return a `receive` that hands it on. Raises as body.py does."""
        options, declared = self._state.options, Headers(scope=scope).get("content-length", "")
        body = await read_body(receive, declared, options.max_body_bytes, options.body_timeout)
        check_json(body)
        pending = [body]

        async def receive_again() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return receive_again

    def _tell(self, scope: Scope, record: Record, now: float) -> None:
        """Log line, trace, and the metrics of requests that generate."""
        path, method = scope["path"], scope["method"]
        served = None
        if path in _ENDPOINTS and method == "POST":
            served = record.served(_ENDPOINTS[path], now)
            self._state.metrics.observe(served)
        if self._state.options.log_prompts and record.generation is not None:
            _LOG.info("prompt", extra={"fields": prompt_fields(record.generation.job, self._state.tokenizer)})
        level = logging.DEBUG if path in _PROBES else logging.INFO
        if _LOG.isEnabledFor(level):
            _LOG.log(level, "request", extra={"fields": request_fields(method, path, record, served, now)})
        if self._tracing is not None and path not in _PROBES:
            self._tracing.request(scope, record, served, now)
