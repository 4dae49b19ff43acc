"""What a client may send: valid requests, valid ones with something wrong in them, and bytes that are no request.

Bodies are made from their structure, so that most get past validation and reach the engine; an example shrinks to the
one field, header or way of sending that matters.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from tests.bundled import FLOOR, FULL, MIDDLE

Sending = Literal["whole", "pieces", "chunked", "leave", "half-close", "cut"]
Headers = tuple[tuple[bytes, bytes], ...]
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # makes a header no HTTP


@dataclass(frozen=True)
class Exchange:
    """One connection: what is sent, and how it ends.

    `sending`: whole or in pieces, then the answer is read; `leave`: closed after the first bytes of the answer;
    `half-close`: nothing more can come after the request; `cut`: closed for sending in the middle of the body.
    """

    path: str = "/health"
    headers: Headers = ()
    body: bytes = b""
    method: str = "POST"
    sending: Sending = "whole"
    raw: bytes | None = None  # sent instead of all of the above, then closed for sending

    @property
    def must_answer(self) -> bool:
        """Whether the client must see an answer: it is there until then, and sends nothing into a connection that was
        closed behind a refusal, for that resets it."""
        if self.raw is not None or self.sending not in ("whole", "pieces", "chunked"):
            return False
        return self.sending == "whole" or not any(_CONTROL.search(value) for _, value in self.headers)

    def pieces(self) -> list[bytes]:
        """The bytes to send, in the pieces they are sent in."""
        if self.raw is not None:
            return [self.raw]
        lines = [f"{self.method} {self.path} HTTP/1.1".encode("latin-1"), b"Host: fuzz", b"Connection: close"]
        lines += [name + b": " + value for name, value in self.headers]
        middle = len(self.body) // 2
        if self.sending == "chunked":
            chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (self.body[:middle], self.body[middle:]) if part]
            return [b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]), *chunks, b"0\r\n\r\n"]
        head = b"\r\n".join([*lines, b"Content-Length: %d" % len(self.body), b"", b""])
        if self.sending == "pieces":
            return [head, self.body[:middle], self.body[middle:]]
        return [head + (self.body[:middle] if self.sending == "cut" else self.body)]


TEXT = st.sampled_from(["", "\ud800", "a\udfff", "\x00", "\r\nX-Evil: 1", "x" * 3000]) | st.text(max_size=12)
WORDS = st.sampled_from(["Once upon a time", "the", " king", "é", "\U0001f600", "\n\n", "\x00", "a" * 300])
SPELLED = st.text(min_size=1, max_size=8)
NAMES = SPELLED | st.just("\ud800")
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0])
    | st.floats()
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
DURATIONS = st.sampled_from([500, 0.001, 3_600_000, "500ms", "0.5s", "1", ".5"])
TOKENS = st.lists(st.integers(0, 2047), min_size=1, max_size=8)

Fields = dict[str, st.SearchStrategy[Any]]
COMMON: Fields = {  # optional fields with values that are served, each for itself
    "max_tokens": st.integers(1, 12) | st.just(200),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 4) | st.just(16),
    "stop": NAMES | st.lists(NAMES, max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stream": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 1),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 10),
    "logit_bias": st.dictionaries(st.integers(0, 2047).map(str), st.floats(-100, 100), max_size=4),
    "user": TEXT,
    "request_id": st.sampled_from(["mine", "a/b:c"]),
    "model": st.sampled_from(["bundled", f"bundled:{FULL}", f"bundled:{FLOOR}"]),
    "latency_budget_ms": DURATIONS,
    "latency_budget_ttft_ms": DURATIONS,
    "latency_budget_tpot_ms": DURATIONS,
    "latency_budget_policy": st.sampled_from(["best-effort", "cut"]),
    "submodel_floor": st.sampled_from([FLOOR, MIDDLE]),
    "quality_floor": st.floats(0, 0.5),
    "kv_mode": st.sampled_from(["exact", "reuse"]),
    "response_format": st.just({"type": "text"}),
    "tool_choice": st.sampled_from(["none", "auto"]),
    "priority": st.just(0),
}
EDGES: Fields = {  # values that are refused for themselves or beside another one, or that are hard to serve
    "max_tokens": st.sampled_from([0, 1024, 2**31 - 1]),
    "max_completion_tokens": st.integers(1, 8),
    "n": st.sampled_from([0, 17]),
    "stop": TEXT | st.lists(TEXT, max_size=20),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
    "top_logprobs": st.integers(0, 21),
    "logprobs": st.booleans() | st.integers(0, 21),
    "echo": st.booleans(),
    "min_tokens": st.integers(0, 300),
    "request_id": TEXT,
    "model": TEXT,
    "latency_budget_ms": st.sampled_from(["nan", "-1", "1e3", 0, 1e-300]),
    "latency_budget_policy": st.sampled_from(["strict", "other"]),
    "submodel": st.sampled_from(["auto", FULL, FLOOR, "d3", ""]) | TEXT,
    "submodel_floor": TEXT,
    "kv_mode": TEXT,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["json_object", "json_schema", "x"])},
        optional={"json_schema": st.fixed_dictionaries({"name": TEXT, "schema": JUNK})},
    ),
    "tools": st.lists(JUNK, max_size=2),
    "tool_choice": st.just("required"),
    "best_of": st.integers(1, 3),
    "priority": st.integers(-1, 1),
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x"])},
        optional={
            "content": WORDS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2),
            "name": TEXT,
        },
    ),
    min_size=1,
    max_size=3,
)
BASES: dict[str, Fields] = {  # what each path needs
    "/v1/completions": {
        "prompt": WORDS | SPELLED | st.lists(WORDS, min_size=1, max_size=3) | TOKENS | st.lists(TOKENS, min_size=1)
    },
    "/v1/chat/completions": {"messages": MESSAGES},
    "/tokenize": {"prompt": WORDS | TEXT},
    "/detokenize": {"tokens": TOKENS},
}
OPTIONAL: dict[str, Fields] = {
    "/v1/completions": COMMON | {"logprobs": st.integers(0, 20), "echo": st.booleans()},
    "/v1/chat/completions": COMMON | {"logprobs": st.booleans()},
    "/tokenize": {"add_special_tokens": st.booleans()},
    "/detokenize": {},
}
NAMED_HEADERS = [
    b"X-Latency-Budget-Ms",
    b"X-Latency-Budget-TTFT-Ms",
    b"x-llm-d-slo-ttft-ms",
    b"x-slo-ttft-ms",
    b"X-Latency-Budget-TPOT-Ms",
    b"x-llm-d-slo-tpot-ms",
    b"X-Latency-Budget-Policy",
    b"X-Submodel",
    b"X-Submodel-Floor",
    b"X-Quality-Floor",
    b"X-KV-Mode",
    b"X-Request-Id",
    b"x-envoy-expected-rq-timeout-ms",
    b"Authorization",
    b"Content-Type",
    b"Content-Encoding",
    b"Accept",
    b"Origin",
    b"Expect",
    b"traceparent",
]
HEADER_VALUES = st.sampled_from(
    [
        b"500",
        b"0.5s",
        b"1ms",
        b"strict",
        b"cut",
        FULL.encode(),
        FLOOR.encode(),
        b"auto",
        b"0.9",
        b"exact",
        b"reuse",
        b"mine",
    ]
) | st.binary(max_size=40).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
GOOD_HEADERS = st.sampled_from(
    [
        (b"X-Latency-Budget-Ms", b"200"),
        (b"X-Latency-Budget-Ms", b"0.001s"),
        (b"x-slo-ttft-ms", b"50"),
        (b"X-Latency-Budget-TPOT-Ms", b"3ms"),
        (b"X-Latency-Budget-Policy", b"cut"),
        (b"X-KV-Mode", b"exact"),
        (b"X-Request-Id", b"a.b:c/d"),
        (b"X-Request-Id", b"a\xff b"),
        (b"Origin", b"http://elsewhere"),
        (b"Expect", b"100-continue"),
        (b"Authorization", b"Bearer \xff"),
    ]
)
HEADERS = st.lists(GOOD_HEADERS, max_size=2, unique_by=lambda header: header[0]).map(tuple) | st.lists(
    st.tuples(st.sampled_from(NAMED_HEADERS), HEADER_VALUES), max_size=3
).map(tuple)
JSON_TYPE = ((b"Content-Type", b"application/json"),)
SENDINGS: st.SearchStrategy[Sending] = st.sampled_from(
    ["whole", "whole", "pieces", "chunked", "leave", "half-close", "cut"]
)


@st.composite
def _body(draw: st.DrawFn, path: str) -> bytes:
    """JSON for `path`: fields with values they may have, a few replaced by anything, now and then damaged as text."""
    optional = OPTIONAL[path]
    body = draw(st.fixed_dictionaries(BASES[path]))
    for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True)) if optional else ():
        body[name] = draw(optional[name])
    if path.startswith("/v1"):
        body.setdefault("max_tokens", 4)
        if draw(st.sampled_from([False, False, True])):
            name = draw(st.sampled_from(sorted(EDGES)))
            body[name] = draw(EDGES[name])
    if draw(st.sampled_from([False, False, False, True])):
        body[draw(st.sampled_from([*sorted({*optional, *body}), "unknown"]))] = draw(JUNK)
    text = json.dumps(body).encode()
    damage = draw(st.sampled_from([None] * 20 + ["cut", "flip", "twice", "deep"]))
    if damage == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if damage == "flip":
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + draw(st.binary(min_size=1, max_size=2)) + text[place + 1 :]
    if damage == "twice":
        return text[:-1] + b', "max_tokens": 2, "max_tokens": 3}'
    if damage == "deep":
        return text[:-1] + b', "deep": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    return text


def _posts(path: str) -> st.SearchStrategy[Exchange]:
    typed = HEADERS.map(lambda more: JSON_TYPE + more)
    headers = st.one_of(typed, typed, typed, HEADERS)
    return st.builds(Exchange, st.just(path), headers, _body(path), sending=SENDINGS)


def exchanges() -> st.SearchStrategy[Exchange]:
    """Anything a client may send."""
    paths = ["/", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/v1/models", "/v1/submodels"]
    paths += [
        f"/v1/models/bundled:{FULL}",
        "/v1/models/%00%ff%0d%0aX:1",
        "/tokenizer_info",
        "/nowhere",
        "//",
        "/v1/../etc",
    ]
    methods = st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
    others = st.builds(Exchange, st.sampled_from([*paths, *BASES]), HEADERS, st.binary(max_size=30), methods)
    garbage = st.builds(Exchange, st.sampled_from(list(BASES)), st.just(JSON_TYPE), st.binary(max_size=60))
    raw = st.binary(max_size=200) | st.tuples(
        st.sampled_from(
            [b"POST /v1/completions HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n", b""]
        ),
        st.lists(st.sampled_from([*NAMED_HEADERS, b"Content-Length", b"Transfer-Encoding", b"Connection"]), max_size=3),
        st.binary(max_size=30),
        st.sampled_from([b"\r\n", b"\n", b"\r", b""]),
    ).map(lambda parts: parts[0] + b"".join(name + b": " + parts[2] + parts[3] for name in parts[1]) + parts[3])
    completions, chat = _posts("/v1/completions"), _posts("/v1/chat/completions")
    return st.one_of(
        completions,
        chat,
        completions,
        chat,
        _posts("/tokenize"),
        _posts("/detokenize"),
        others,
        garbage,
        raw.map(lambda content: Exchange(raw=content)),
    )
