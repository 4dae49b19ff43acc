"""What /openapi.json says of operations beyond the types: header parameters, answers by status, limits, examples.

Handlers read headers themselves (budget_headers.py), because a repeated one must be refused, and errors come from the
exception tree; neither is anything that FastAPI could find out.
"""

from typing import Any

from pydantic import BaseModel

from sortserve.engine.budget import MAX_BUDGET_MS
from sortserve.engine.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS
from sortserve.server.answers_schema import ErrorResponse
from sortserve.server.budget_headers import KV_MODES, POLICIES, TOTAL_HEADERS, TPOT_HEADERS, TTFT_HEADERS

Responses = dict[int | str, dict[str, Any]]
_DURATION = r"^([0-9]+\.?[0-9]*|\.[0-9]+) ?(ms|s)?$"
_MILLISECONDS: dict[str, dict[str, Any]] = {
    "number": {"exclusiveMinimum": 0, "maximum": MAX_BUDGET_MS},
    "string": {"pattern": _DURATION},
}
_REQUEST_ID = r"^[A-Za-z0-9._:/+=@-]{1,128}$"

# Limits of body fields by JSON type. SamplingParams, Budget and schemas.py enforce them; a test compares.
LIMITS: dict[str, dict[str, dict[str, Any]]] = {
    "prompt": {"string": {"minLength": 1}, "array": {"minItems": 1}},
    "max_tokens": {"integer": {"minimum": 0}},  # 0 only with echo
    "max_completion_tokens": {"integer": {"minimum": 0}},
    "temperature": {"number": {"minimum": 0, "maximum": 2}},
    "top_p": {"number": {"exclusiveMinimum": 0, "maximum": 1}},
    "top_k": {"integer": {"minimum": -1, "maximum": 2**31 - 1}},
    "min_p": {"number": {"minimum": 0, "maximum": 1}},
    "n": {"integer": {"minimum": 1, "maximum": 16}},
    "stop": {
        "string": {"minLength": 1, "maxLength": MAX_STOP_CHARS},
        "array": {
            "maxItems": MAX_STOP_STRINGS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        },
    },
    "min_tokens": {"integer": {"minimum": 0}},
    "frequency_penalty": {"number": {"minimum": -2, "maximum": 2}},
    "presence_penalty": {"number": {"minimum": -2, "maximum": 2}},
    "repetition_penalty": {"number": {"exclusiveMinimum": 0, "maximum": 10}},
    "logit_bias": {
        "object": {
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    },
    "logprobs": {"integer": {"minimum": 0, "maximum": MAX_LOGPROBS}},
    "top_logprobs": {"integer": {"minimum": 0, "maximum": MAX_LOGPROBS}},
    "priority": {"integer": {"minimum": 0, "maximum": 0}},
    "suffix": {"string": {"maxLength": 0}},
    "functions": {"array": {"maxItems": 0}},
    "quality_floor": {"number": {"minimum": 0, "maximum": 1}},
    "latency_budget_ms": _MILLISECONDS,
    "latency_budget_ttft_ms": _MILLISECONDS,
    "latency_budget_tpot_ms": _MILLISECONDS,
    "latency_budget_policy": {"string": {"enum": list(POLICIES)}},
    "kv_mode": {"string": {"enum": list(KV_MODES)}},
}


def add_limits(schema: dict[str, Any]) -> None:
    """Write the limits of a body's fields into its JSON schema; for pydantic's `json_schema_extra`."""
    for name, field in schema["properties"].items():
        limits = LIMITS.get(name, {})
        for branch in field.get("anyOf", [field]):
            branch.update(limits.get(branch.get("type", ""), {}))


def generation_extra(*examples: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of an operation that generates: its headers, and bodies that are worth trying."""
    named = {f"example-{number}": {"value": example} for number, example in enumerate(examples, 1)}
    return {
        "parameters": [*_BUDGET_PARAMETERS, REQUEST_ID_PARAMETER],
        "requestBody": {"content": {"application/json": {"examples": named}}},
    }


def _parameter(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _duration_parameters(names: tuple[str, ...], meaning: str) -> list[dict[str, Any]]:
    text = f"{meaning}, written like 500, 500ms or 0.5s; over 0, at most {MAX_BUDGET_MS:.0f} ms"
    schema = {"type": "string", "pattern": _DURATION, "examples": ["500", "500ms", "0.5s"]}
    alias = f"; the same as {names[0]}"
    return [_parameter(name, text + (alias if name != names[0] else ""), schema) for name in names]


REQUEST_ID_PARAMETER = _parameter(
    "X-Request-Id",
    "Comes back in the answer and in the log; another one is made for it if unusable",
    {"type": "string"},
)
_BUDGET_PARAMETERS = [
    *_duration_parameters(TOTAL_HEADERS, "Latency budget from the last byte of the request to the last token"),
    *_duration_parameters(TTFT_HEADERS, "Latency budget to the first token"),
    *_duration_parameters(TPOT_HEADERS, "Latency budget per output token after the first"),
    _parameter(
        "X-Latency-Budget-Policy",
        "best-effort (default): late if need be; strict: refuse; cut: stop in time",
        {"type": "string", "enum": list(POLICIES)},
    ),
    _parameter("X-Submodel", "Id of the ladder to pin, or auto", {"type": "string"}),
    _parameter("X-Submodel-Floor", "Id of the smallest sub-model accepted", {"type": "string"}),
    _parameter(
        "X-Quality-Floor",
        "Share of the full model's quality that must be kept",
        {"type": "number", "minimum": 0, "maximum": 1},
    ),
    _parameter(
        "X-KV-Mode",
        "exact, or reuse (the default of auto with a budget)",
        {"type": "string", "enum": list(KV_MODES)},
    ),
]

# --- answers by status ------------------------------------------------------------------------------------------------


def _header(description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description, "schema": schema or {"type": "string"}}


_ID_HEADER = {
    "X-Request-Id": _header("The one that was sent, or a new one", {"type": "string", "pattern": _REQUEST_ID})
}
_RETRY_HEADERS = {
    "Retry-After": _header("Seconds", {"type": "integer", "minimum": 1}),
    "retry-after-ms": _header("Milliseconds", {"type": "integer", "minimum": 1}),
    "X-Dropped-Reason": _header(
        "rejected-saturated, rejected-rate-limited or rejected-shutting-down; absent for other reasons"
    ),
}
_NUMBER = {"type": "number"}
_ANSWER_HEADERS = {
    "X-Submodel": _header("The sub-model chosen first"),
    "X-Latency-Budget-Ms": _header("As applied", _NUMBER),
    "X-Latency-Budget-TTFT-Ms": _header("As applied", _NUMBER),
    "X-Latency-Budget-TPOT-Ms": _header("As applied", _NUMBER),
    "X-Latency-Predicted-Ms": _header("End to end, where a budget is given", _NUMBER),
    "X-Latency-Budget-Status": _header(
        "On a stream what was predicted when it began, else what became of it",
        {"type": "string", "enum": ["ok", "predicted-miss", "met", "missed"]},
    ),
    "Server-Timing": _header("queue, prefill and decode in milliseconds"),
}
_ERRORS: dict[int, tuple[str, dict[str, Any]]] = {
    400: (
        "The request cannot be served as it was asked",
        {"x-should-retry": _header("false where another try cannot help")},
    ),
    401: ("The API key is missing or unknown", {"WWW-Authenticate": _header("Bearer")}),
    404: ("Unknown model or sub-model; the message lists what there is", {}),
    408: ("The client stopped in the middle of its headers or body", _RETRY_HEADERS),
    413: ("The body is over the limit", {}),
    429: ("The queue is full, a strict budget cannot be met now, or the key is over its rate", _RETRY_HEADERS),
    431: ("Request line and headers are over the limit", {}),
    500: ("Our own bug; the log has it under the X-Request-Id", {}),
    503: ("Loading, shutting down, or the engine died", _RETRY_HEADERS),
}


def answered(*statuses: int) -> Responses:
    """The errors that operations answer with, by status."""
    return {
        status: {"model": ErrorResponse, "description": _ERRORS[status][0], "headers": _ERRORS[status][1] | _ID_HEADER}
        for status in statuses
    }


def generated(model: type[BaseModel], chunk: str) -> Responses:
    """The 200 of an operation that generates: a whole answer, or a stream of objects of the kind `chunk`."""
    stream = (
        f"With `stream`: events `data: {{...}}`, each a `{chunk}` object with the same id, created and model; with "
        "`stream_options.include_usage` one more with `usage` and no choices; the last one is `data: [DONE]`. An error "
        "on the way is one event with the key `error`. The last object also carries `sortserve`."
    )
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "description": stream}}}
    content = {"text/event-stream": {"itemSchema": event}}
    return {
        200: {
            "model": model,
            "description": "The answer, whole or streamed",
            "content": content,
            "headers": _ANSWER_HEADERS | _ID_HEADER,
        }
    }


def plain_text(*media_types: str) -> Responses:
    """A 200 that is text, in one of several formats."""
    return {200: {"description": "Text", "content": {media: {"schema": {"type": "string"}} for media in media_types}}}
