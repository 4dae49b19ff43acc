"""Loaded into schemathesis: makes more of the generated bodies ones that are served, and served soon.

The document cannot say that one field needs another, so nearly all random bodies would stop at the first check and the
engine would hardly be reached. Half of the bodies stay as they were generated.
"""

from typing import Any

import schemathesis

LONG = 8  # tokens; more teach nothing and take seconds, with up to 16 answers to several prompts
UNSERVED = ("functions", "best_of", "suffix", "modalities", "audio")


ALIASES = (
    ("X-Latency-Budget-TTFT-Ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"),
    ("X-Latency-Budget-TPOT-Ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"),
)


def map_headers(context: Any, headers: Any) -> Any:
    """Of names that mean the same keep one; two are refused, which tests of the server's own cover."""
    for names in ALIASES:
        for name in [name for name in names if name in (headers or {})][1:]:
            del headers[name]
    return headers


def map_body(context: Any, body: Any) -> Any:
    """Repair what contradicts itself in a generation request."""
    if not isinstance(body, dict) or not ("prompt" in body or "messages" in body):
        return body
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = LONG  # a chat would go on to the end of the context
    if len(repr(body)) % 2:
        return body
    for name in UNSERVED:
        body.pop(name, None)
    body.pop("max_completion_tokens", None)
    if not isinstance(body.get("max_tokens"), int) or not 0 <= body["max_tokens"] <= LONG:
        body["max_tokens"] = LONG
    if isinstance(body.get("min_tokens"), int):
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if "messages" in body:
        body["echo"] = False
    elif body["max_tokens"] == 0:
        body["echo"] = True
    if body.get("latency_budget_policy") is not None:
        body.setdefault("latency_budget_ms", 60_000)
    if body.get("submodel") not in (None, "auto"):
        for name in ("model", "submodel_floor", "quality_floor"):
            body.pop(name, None)
    return body


schemathesis.hook(map_headers)
schemathesis.hook(map_body)
