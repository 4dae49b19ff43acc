"""What surrounds every request: its id, the API key, the size of its body, its arrival, its log line and metrics."""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.engine.errors import AuthenticationError, PayloadTooLargeError, SortServeError
from sortserve.server.answer import all_met, first_token_seconds, per_token_seconds
from sortserve.server.completions import Generation
from sortserve.server.errors import error_response, internal_error_response
from sortserve.server.metrics import Served
from sortserve.server.state import ServerState
from sortserve.server.streams import ClientGoneError

_LOG = logging.getLogger("sortserve.server")
_ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}  # those that generate
_WITHOUT_KEY = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"})
_PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: not worth a line each
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_CLIENT_GONE = 499  # nginx's number for it; never sent, only counted
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


@dataclass
class Record:
    """One HTTP request while it is served, as `request.state.record`. `arrival`: when its last byte was read."""

    request_id: str
    id_was_given: bool
    arrival: float
    generation: Generation | None = None
    status: int = 0


class ContextMiddleware:
    """The outermost layer of the app. Nothing it catches reaches the client with a trace."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._key_digests = [_digest(key) for key in state.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        usable = _REQUEST_ID.fullmatch(given) is not None
        record = Record(given if usable else f"req-{uuid.uuid4().hex}", usable, started)
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["X-Request-Id"] = record.request_id
                headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED_HEADERS)
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            await self._serve(scope, receive, send_with_headers, record)
        except ClientGoneError:
            record.status = _CLIENT_GONE
        except Exception:
            _LOG.exception("request %s failed", record.request_id)
            if record.status:
                raise  # the response has begun: all that is left is to cut the connection
            await internal_error_response()(scope, receive, send_with_headers)
        finally:
            self._tell(scope, record, time.monotonic() - started)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            self._check_key(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._read_body(scope, receive)
        except SortServeError as error:
            await error_response(error)(scope, receive, send)
            return
        record.arrival = time.monotonic()
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        """Raise AuthenticationError unless no key is needed or the right one is there."""
        if not self._key_digests or scope["method"] == "OPTIONS" or scope["path"] in _WITHOUT_KEY:
            return
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not _any_equal(_digest(key.strip()), self._key_digests):
            raise AuthenticationError(
                "missing or unknown API key; send one header `Authorization: Bearer <key>`", param="Authorization"
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, and return a `receive` that hands it on. Raises PayloadTooLargeError."""
        limit = self._state.options.max_body_bytes
        too_large = PayloadTooLargeError(f"the body is over the limit of {limit} bytes; send less in one request")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        chunks, num_bytes, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            if num_bytes > limit:
                raise too_large
            more = message.get("more_body", False)
        pending = [b"".join(chunks)]

        async def receive_again() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return receive_again

    def _tell(self, scope: Scope, record: Record, duration: float) -> None:
        """One log line, never with what was asked or answered; and the metrics of requests that generate."""
        path = scope["path"]
        generation = record.generation
        served = None
        if path in _ENDPOINTS and scope["method"] == "POST":
            served = _served(_ENDPOINTS[path], record, duration)
            self._state.metrics.observe(served)
        level = logging.DEBUG if path in _PROBES else logging.INFO
        _LOG.log(
            level,
            "request id=%s method=%s path=%.80r status=%d ms=%.1f%s%s",
            record.request_id,
            scope["method"],
            path,
            record.status,
            duration * 1e3,
            "" if served is None else f" submodel={served.submodel} finish={served.finish_reason}",
            ""
            if generation is None
            else f" job={generation.job.id} prompt_tokens={generation.job.num_prompt_tokens}"
            f" completion_tokens={sum(answer.num_tokens for answer in generation.answers)}",
        )


def _served(endpoint: str, record: Record, duration: float) -> Served:
    generation = record.generation
    if generation is None:
        return Served(endpoint, record.status, "none", duration)
    job, answers, budget = generation.job, generation.answers, generation.job.terms.budget
    complete = all(answer.finish_reason is not None for answer in answers)
    last = max((answer.last_time for answer in answers if answer.last_time is not None), default=None)
    outcome = None
    if budget is not None:
        met = complete and all_met(job, answers, record.arrival + duration if last is None else last)
        outcome = "met" if met else "missed" if generation.accepted else "refused"
    if complete:
        reason = answers[0].finish_reason or "stop"
    elif record.status == _CLIENT_GONE:
        reason = "abort"
    else:
        reason = "error" if generation.accepted else "none"
    return Served(
        endpoint,
        record.status,
        reason,
        duration,
        generation.submodel,
        None if budget is None else budget.policy,
        outcome,
        None if budget is None or budget.total_ms is None else budget.total_ms / 1e3,
        generation.predicted_seconds,
        generation.accepted[0].queue_seconds if generation.accepted else None,
        first_token_seconds(job, answers),
        per_token_seconds(answers),
        last - job.arrival if complete and last is not None else None,
    )


def _digest(key: str) -> bytes:
    """Of equal length for every key, so that comparing takes equal time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _any_equal(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compares with every one, so that the time does not tell which one was right."""
    return sum(hmac.compare_digest(digest, one) for one in known) > 0
