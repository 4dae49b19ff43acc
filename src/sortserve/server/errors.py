"""Errors as HTTP: every answer that is not 2xx has the body `{"error": {"message", "type", "param", "code"}}`.

Status, type and code come from the class (engine/errors.py); what only the transport knows is here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sortserve.engine.errors import (
    AuthenticationError,
    BudgetInfeasibleError,
    DrainingError,
    OverloadedError,
    RateLimitedError,
    RequestError,
    SortServeError,
    UnavailableError,
)

INTERNAL_MESSAGE = "internal error; the server's log has it under the X-Request-Id of this response"
_SHOWN_CHARS = 300  # of a message made from what the client sent
_MAX_MESSAGE_CHARS = 2000  # a list of sub-models may be long; what a client sent is not given back at length


class LoadingError(UnavailableError):
    """The server listens, but its model is not loaded yet."""

    code = "loading"


class ReadTimeoutError(UnavailableError):
    """The client stopped in the middle of its request; clients send a 408 again."""

    status = 408
    kind = "invalid_request_error"
    code = "request_timeout"


class InvalidJsonError(RequestError):
    """The body cannot be read as JSON."""

    code = "invalid_json"


class InvalidHttpError(RequestError):
    """What came is no HTTP."""

    code = "invalid_http"


class HeadersTooLargeError(RequestError):
    """Request line and headers are over the limit."""

    status = 431
    code = "headers_too_large"


def error_object(error: SortServeError) -> dict[str, Any]:
    """The `error` object of a response body or of a stream."""
    return {"message": error.message[:_MAX_MESSAGE_CHARS], "type": error.kind, "param": error.param, "code": error.code}


def error_headers(error: SortServeError) -> dict[str, str]:
    """Headers that tell clients and routers whether and when to try again."""
    headers: dict[str, str] = {}
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1e3)))
    if isinstance(error, OverloadedError):
        headers["X-Dropped-Reason"] = "rejected-saturated"
    if isinstance(error, RateLimitedError):
        headers["X-Dropped-Reason"] = "rejected-rate-limited"
    if isinstance(error, DrainingError):
        headers["X-Dropped-Reason"] = "rejected-shutting-down"
    if isinstance(error, BudgetInfeasibleError):
        headers["x-should-retry"] = "false"
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: SortServeError) -> Response:
    """The whole response for an error."""
    return _response(error.status, error_object(error), error_headers(error))


def internal_error_response() -> Response:
    """A 500 that says nothing of the inside."""
    return error_response(SortServeError(INTERNAL_MESSAGE))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception in the contract's shape, FastAPI's own 404, 405 and 422 included."""
    app.add_exception_handler(SortServeError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


def _response(status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    # ASCII, because a message may quote a lone surrogate, which UTF-8 cannot carry
    return Response(json.dumps({"error": error}).encode("ascii"), status, headers, media_type="application/json")


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SortServeError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {
        # FastAPI's own, where the parser raised something else than a JSON error
        400: ("invalid_request_error", "invalid_json", "the body is not valid JSON: a number has over 4,300 digits"),
        404: ("not_found_error", "not_found", f"no path {request.url.path}; see /openapi.json for what there is"),
        405: ("invalid_request_error", "method_not_allowed", f"{request.method} is not allowed on {request.url.path}"),
    }
    fallback = ("invalid_request_error" if error.status_code < 500 else "server_error", "invalid_request", error.detail)
    kind, code, message = kinds.get(error.status_code, fallback)
    body = {"message": str(message)[:_SHOWN_CHARS], "type": kind, "param": None, "code": code}
    return _response(error.status_code, body, error.headers or {})


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:] if not _is_union_branch(str(part))]
    if first["type"] == "json_invalid":
        detail = (first.get("ctx") or {}).get("error", "")
        message, code, param = f"the body is not valid JSON: {detail}", "invalid_json", None
    elif not place:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        code, param = "invalid_body", None
    else:
        param = place[0]
        code = "missing_field" if first["type"] == "missing" else "invalid_type"
        message = f"{_path(place)}: {_reason(error.errors(), param)}"
    body = {"message": message[: 2 * _SHOWN_CHARS], "type": "invalid_request_error", "param": param, "code": code}
    return _response(400, body, {})


def _reason(errors: Sequence[Mapping[str, Any]], param: str) -> str:
    """What is wrong with a field, all branches of a union told."""
    reasons = [str(error["msg"]) for error in errors if len(error["loc"]) > 1 and str(error["loc"][1]) == param]
    return "; or ".join(dict.fromkeys(reasons))


def _is_union_branch(part: str) -> bool:
    """pydantic puts the branch's name (`list[int]`, `str`) into the place; a client knows no such part."""
    return "[" in part or part in ("str", "int", "float", "bool")


def _path(place: Sequence[str]) -> str:
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place).removeprefix(".")
