"""Latency budgets for a user's own `vllm serve`: ASGI middleware that turns our headers and body fields into `vllm_xargs`.

    vllm serve MODEL ... --middleware sortserve.server.vllm_middleware.LatencyBudgets

The ladder is read from the configuration that vLLM's server keeps, so ids and floors are checked here, where a mistake is
a 400: an exception in vLLM's scheduler would end its engine. Where the scheduler is told to report (`stats_address`), its
figures are put behind vLLM's own on `/metrics`. Imports no vLLM.
"""

import json
import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import zmq
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.engine.admission import resolve_terms
from sortserve.engine.errors import PayloadTooLargeError, RequestError, SortServeError
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.vllm.configuration import KEY
from sortserve.engine.vllm.translate import check_extra_args, extra_args
from sortserve.server.budget_headers import BodyTerms, read_terms
from sortserve.server.errors import error_response
from sortserve.server.vllm_reports import Reports

_LOG = logging.getLogger(__name__)

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
MAX_BODY_BYTES = 64 << 20
XARGS = "vllm_xargs"

_NAMES = tuple(BodyTerms.model_fields)  # vLLM's own server does not know them


class LatencyBudgets:
    """The middleware. `ladder`: for tests; None: of the app's `state.vllm_config`."""

    def __init__(self, app: ASGIApp, ladder: Ladder | None = None) -> None:
        self._app = app
        self._ladder = ladder
        self._reports: Reports | None = None
        self._listening = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; of a request for text, its body with what our headers say."""
        if scope["type"] == "http":
            self._listen(scope)
            if scope["path"].rstrip("/") == "/metrics" and self._reports is not None:
                # plain text, since OpenMetrics has an end of its own, and not compressed
                scope, send = {**scope, "headers": [(b"accept", b"text/plain")]}, _Appending(send, self._reports)
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            if scope["type"] == "lifespan" and self._reports is not None:
                self._reports.close()  # the server has ended
                self._reports = None
            return
        arrival = time.monotonic()
        try:
            content = await _read(receive)
            content = self._rewritten(scope, content, arrival)
        except SortServeError as error:
            await error_response(error)(scope, receive, send)
            return
        scope = {**scope, "headers": _with_length(scope["headers"], len(content))}
        await self._app(scope, _Given(content, receive), send)

    def _listen(self, scope: Scope) -> None:
        """From the first request on, if there is an address. A second server process finds it taken, and goes without."""
        if self._listening:
            return
        self._listening = True
        settings = scope["app"].state.vllm_config
        address = (settings.additional_config or {}).get(KEY, {}).get("stats_address")
        if address:
            names = settings.model_config.served_model_name
            try:
                self._reports = Reports(address, names if isinstance(names, str) else names[0])
            except zmq.ZMQError as error:
                _LOG.warning("no sortserve_ metrics of this process: %s: %s", address, error)

    def _rewritten(self, scope: Scope, content: bytes, arrival: float) -> bytes:
        """Raises SortServeError for what our headers, fields or arguments say wrong; other mistakes are vLLM's to tell."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return content
        if not isinstance(body, dict):
            return content
        headers, given = Headers(scope=scope), body.get(XARGS) or {}
        fields = _fields({name: body.pop(name) for name in _NAMES if name in body})
        ladder = self._ladder or _ladder_of(scope)
        if not isinstance(given, dict):
            return content  # vLLM says what is wrong with it
        check_extra_args(given, ladder)
        terms = read_terms(headers, fields, ladder, capabilities=frozenset({"reuse"}))
        if terms.budget is None and terms.submodel == "auto" and terms.floor is None and terms.quality_floor is None:
            return json.dumps(body).encode()
        asked = GenerateRequest(
            "",
            (0,),
            SamplingParams(),
            arrival,
            terms.budget,
            terms.submodel,
            terms.floor,
            terms.quality_floor,
            terms.kv_mode,
        )
        resolved = resolve_terms(asked, ladder)
        ours = extra_args(asked, resolved, ladder, time.time() - time.monotonic())
        return json.dumps({**body, XARGS: {**given, **ours}}).encode()


def _fields(given: dict[str, Any]) -> BodyTerms:
    try:
        return BodyTerms.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise RequestError(f"{name} is {given[name]!r:.100}, which is of the wrong type", param=name) from error


def _ladder_of(scope: Scope) -> Ladder:
    """Of the model that vLLM serves."""
    settings = scope["app"].state.vllm_config
    own = (settings.additional_config or {}).get(KEY, {})
    return _ladder(str(settings.model_config.model), str(own.get("ladder") or ""))


@lru_cache(maxsize=4)
def _ladder(folder: str, path: str) -> Ladder:
    shape = load_model_config(Path(folder)).shape
    return Ladder.of_folder(Path(folder), shape, Path(path) if path else None)


async def _read(receive: Receive) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(content)
        content += message.get("body", b"")
        if len(content) > MAX_BODY_BYTES:
            raise PayloadTooLargeError(f"the body is over {MAX_BODY_BYTES} bytes")
        if not message.get("more_body", False):
            return bytes(content)


class _Appending:
    """A `send` that puts our figures behind a body of text."""

    def __init__(self, send: Send, reports: Reports) -> None:
        self._send, self._reports = send, reports
        self._plain = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._plain = message["status"] == 200 and kind.startswith("text/plain")
            if self._plain:
                kept = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
                message = {**message, "headers": kept}
        elif self._plain and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + self._reports.render()}
        await self._send(message)


class _Given:
    """A `receive` whose body is there already; what comes after it is the client's."""

    def __init__(self, content: bytes, receive: Receive) -> None:
        self._content: bytes | None = content
        self._receive = receive

    async def __call__(self) -> Message:
        content, self._content = self._content, None
        if content is None:
            return await self._receive()
        return {"type": "http.request", "body": content, "more_body": False}


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]
