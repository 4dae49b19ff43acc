"""The terms of service a request asks for: latency budget, sub-model, floors and kind of K/V, from headers and body.

A header wins over the body field of the same meaning. A bad or repeated header is a 400 whose `param` is its name. What is
asked for is then narrowed: by the bounds of the request's key, and by the time after which a trusted proxy gives up.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers

from sortserve.engine.budget import MAX_BUDGET_MS, Budget, BudgetPolicy
from sortserve.engine.errors import RequestError
from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import KVMode
from sortserve.server.keys import NO_BOUNDS, Bounds

TOTAL_HEADERS = ("X-Latency-Budget-Ms",)
TTFT_HEADERS = ("X-Latency-Budget-TTFT-Ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("X-Latency-Budget-TPOT-Ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
PROXY_HEADERS = ("x-envoy-expected-rq-timeout-ms",)
POLICIES: tuple[BudgetPolicy, ...] = get_args(BudgetPolicy)
KV_MODES: tuple[KVMode, ...] = get_args(KVMode)
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)\s*(ms|s)?", re.ASCII)
_MAX_CHARS = 32  # longer is no number anyone means, and would be quoted in an error


class BodyTerms(BaseModel):
    """The body fields read here; None where the client left one out."""

    model_config = ConfigDict(strict=True)

    latency_budget_ms: float | str | None = None
    latency_budget_ttft_ms: float | str | None = None
    latency_budget_tpot_ms: float | str | None = None
    latency_budget_policy: str | None = None
    submodel: str | None = None
    submodel_floor: str | None = None
    quality_floor: float | None = None
    kv_mode: str | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What was asked for, checked against the ladder. `submodel` is `auto` or an id of the ladder."""

    budget: Budget | None = None
    submodel: str = "auto"
    floor: str | None = None
    quality_floor: float | None = None
    kv_mode: KVMode | None = None

    @property
    def effective_kv_mode(self) -> KVMode:
        """The kind of K/V the answer has: as asked, else `reuse` only for `auto` with a budget."""
        return self.kv_mode or ("reuse" if self.submodel == "auto" and self.budget is not None else "exact")


def read_terms(
    headers: Headers,
    body: BodyTerms,
    ladder: Ladder,
    *,
    pinned: str | None = None,
    default_budget_ms: float | None = None,
    bounds: Bounds = NO_BOUNDS,
    trust_proxy_timeouts: bool = False,
    capabilities: frozenset[str] = frozenset(),
) -> Terms:
    """The terms of one request. `pinned` is the sub-model that the `model` field named (`<model>:<id>`), `bounds` what
    the request's key may ask for.

    Raises RequestError for a value that is malformed, out of range or contradicts another one, NotFoundError for a
    sub-model that the ladder does not have.
    """
    submodel = _submodel(headers, body, ladder, pinned)
    floor, floor_param = _text(headers, ("X-Submodel-Floor",), body.submodel_floor, "submodel_floor")
    if floor is not None and ladder.place(floor, param=floor_param) > _ceiling(ladder, submodel):
        raise RequestError(f"the floor {floor} is above the sub-model {submodel} that is asked for", param=floor_param)
    quality, quality_param = _quality(headers, body)
    if quality is not None and ladder.quality_floor(quality) > _ceiling(ladder, submodel):
        raise RequestError(
            f"sub-model {submodel} has less than {quality} of the full model's quality; ask for one or the other",
            param=quality_param,
        )
    kv_mode, kv_param = _text(headers, ("X-KV-Mode",), body.kv_mode, "kv_mode")
    if kv_mode is not None and kv_mode not in KV_MODES:
        raise RequestError(f"KV mode is {kv_mode[:_MAX_CHARS]!r}, must be exact or reuse", param=kv_param)
    if kv_mode == "reuse" and "reuse" not in capabilities:
        raise RequestError("KV mode reuse is not supported by this back end; ask for exact", param=kv_param)
    budget = _budget(headers, body, default_budget_ms, bounds, trust_proxy_timeouts)
    by_default_full = floor is None and quality is None and budget is None
    floor = _raised(floor, bounds, ladder, submodel, by_default_full)
    return Terms(budget, submodel, floor, quality, kv_mode)


def parse_milliseconds(value: float | str, param: str) -> float:
    """`500`, `500ms` or `0.5s` in milliseconds. Raises RequestError, with `param`, unless in (0, 3,600,000]."""
    milliseconds = math.nan
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip()) if len(value) <= _MAX_CHARS else None
        if match is not None:
            milliseconds = float(match[1]) * (1e3 if match[2] == "s" else 1.0)
    else:
        milliseconds = float(value)
    if not 0 < milliseconds <= MAX_BUDGET_MS:
        shown = str(value)[:_MAX_CHARS]
        raise RequestError(
            f"{param} is {shown!r}, must be milliseconds over 0 and at most {MAX_BUDGET_MS:.0f}, "
            "written like 500, 500ms or 0.5s",
            param=param,
        )
    return milliseconds


def _budget(
    headers: Headers, body: BodyTerms, default_ms: float | None, bounds: Bounds, trust_proxy: bool
) -> Budget | None:
    total = _milliseconds(headers, TOTAL_HEADERS, body.latency_budget_ms, "latency_budget_ms")
    ttft = _milliseconds(headers, TTFT_HEADERS, body.latency_budget_ttft_ms, "latency_budget_ttft_ms")
    tpot = _milliseconds(headers, TPOT_HEADERS, body.latency_budget_tpot_ms, "latency_budget_tpot_ms")
    policy, param = _text(headers, ("X-Latency-Budget-Policy",), body.latency_budget_policy, "latency_budget_policy")
    if policy is not None and policy not in POLICIES:
        raise RequestError(f"{param} is {policy[:_MAX_CHARS]!r}, must be best-effort, strict or cut", param=param)
    if total is None and ttft is None and tpot is None:
        total = default_ms
    total = bounds.narrow(total)
    timeout = _proxy_timeout(headers) if trust_proxy else None
    if total is not None and timeout is not None:
        total = min(total, timeout)  # a cap, not a budget: whoever asks for none gets none because of a proxy
    if ttft is not None and timeout is not None:
        ttft = min(ttft, timeout)
    if total is None and ttft is None and tpot is None:
        if policy in ("strict", "cut"):
            raise RequestError(f"{param} is {policy} but no budget is given; add X-Latency-Budget-Ms", param=param)
        return None
    return Budget(total, ttft, tpot, policy or "best-effort")


def _proxy_timeout(headers: Headers) -> float | None:
    """Milliseconds after which the proxy in front gives the request up; None if it does not say, or waits for ever."""
    text, param = _header(headers, PROXY_HEADERS)
    if text is not None and not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise RequestError(
            f"{param} is {text[:_MAX_CHARS]!r}, must be whole milliseconds, as Envoy sends it", param=param
        )
    return float(text) if text is not None and int(text) > 0 else None


def _raised(floor: str | None, bounds: Bounds, ladder: Ladder, submodel: str, by_default_full: bool) -> str | None:
    """The floor that was asked for, or the key's where that is higher. Raises RequestError for a pin below it."""
    if bounds.floor is None:
        return floor
    if ladder.place(bounds.floor) > _ceiling(ladder, submodel):
        raise RequestError(
            f"this API key is served {bounds.floor} and above, sub-model {submodel} is below it; ask for auto, or for "
            f"{bounds.floor} and above",
            param="submodel",
        )
    if by_default_full:
        return None  # the key's floor would only lower it
    return bounds.floor if floor is None or ladder.place(floor) < ladder.place(bounds.floor) else floor


def _submodel(headers: Headers, body: BodyTerms, ladder: Ladder, pinned: str | None) -> str:
    if body.submodel is not None and pinned is not None and body.submodel != pinned:
        raise RequestError(
            f"submodel is {body.submodel[:_MAX_CHARS]!r} but the model field names {pinned!r}; give one of them",
            param="submodel",
        )
    given, param = _text(headers, ("X-Submodel",), body.submodel, "submodel")
    if given is None:
        given, param = pinned, "model"
    if given is None or given == "auto":
        return "auto"
    ladder.place(given, param=param)
    return given


def _ceiling(ladder: Ladder, submodel: str) -> int:
    return ladder.full if submodel == "auto" else ladder.place(submodel)


def _quality(headers: Headers, body: BodyTerms) -> tuple[float | None, str]:
    text, param = _header(headers, ("X-Quality-Floor",))
    if text is None:
        value, param = body.quality_floor, "quality_floor"
    else:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if value is not None and not 0.0 <= value <= 1.0:
        shown = text[:_MAX_CHARS] if text is not None else value
        raise RequestError(f"{param} is {shown!r}, must be a share of the full model's quality, 0 to 1", param=param)
    return value, param


def _milliseconds(headers: Headers, names: Sequence[str], in_body: float | str | None, field: str) -> float | None:
    text, param = _header(headers, names)
    if text is not None:
        return parse_milliseconds(text, param)
    return None if in_body is None else parse_milliseconds(in_body, field)


def _text(headers: Headers, names: Sequence[str], in_body: str | None, field: str) -> tuple[str | None, str]:
    """The value and where it came from."""
    text, param = _header(headers, names)
    return (in_body, field) if text is None else (text, param)


def _header(headers: Headers, names: Sequence[str]) -> tuple[str | None, str]:
    """The value of the one header given among aliases, and its name. Raises RequestError if there are two."""
    given = [(value.strip(), name) for name in names for value in headers.getlist(name)]
    if not given:
        return None, names[0]
    if len(given) > 1:
        repeated = given[1][1]
        spellings = f" (as {', '.join(dict.fromkeys(name for _, name in given))})"
        raise RequestError(f"header {repeated} is given {len(given)} times{spellings}; give it once", param=repeated)
    return given[0]
