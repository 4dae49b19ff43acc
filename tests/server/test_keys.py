"""The keys file: what is refused, what a key's bounds do to a request, rates, and reading it again."""

import asyncio
import hashlib
import hmac
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from sortserve.engine.budget import Budget
from sortserve.engine.errors import KeysFileError, RateLimitedError, StartupError
from sortserve.server.budget_headers import read_terms
from sortserve.server.keys import Bounds, Bucket, Key, KeyRing, read_keys
from sortserve.server.schemas import CompletionRequest
from sortserve.server.state import ServerOptions
from tests.server.fake_backend import FakeBackend, ladder, open_client, state_of

KEYS = f"""
[[keys]]
name = "batch"
key = "sha256:{hashlib.sha256(b"hashed").hexdigest()}"
min_budget_ms = 200
max_budget_ms = 5_000
floor = "d4-w50"

[[keys]]
name = "slow"
key = "plain"
requests_per_minute = 2
burst = 2
"""
ASK = {"prompt": "x", "max_tokens": 2}


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **headers}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    return file


def entry(**fields: Any) -> str:
    told = {"name": '"a"', "key": '"k"', **fields}
    return "[[keys]]\n" + "\n".join(f"{name} = {value}" for name, value in told.items() if value is not None) + "\n"


# --- the file


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "keys"),
        ("keys = []", "no [[keys]]"),
        ("[[keys]]\nname = \n", "line 2"),
        (entry() + "[other]\n", "other"),
        (entry(name=None), "name"),
        (entry(key=None), "keys[0]"),
        (entry(ceiling='"d4"'), "ceiling"),
        (entry(key="5"), "keys[0].key"),
        (entry(name='"a b"'), "name is 'a b'"),
        (entry(key='""'), "(a): key must be"),
        (entry(key='"a b"'), "(a): key must be"),
        (entry(key='"sha256:SECRET"'), "64 hexadecimal"),
        (entry(max_budget_ms="0"), "max_budget_ms is 0"),
        (entry(max_budget_ms="nan"), "max_budget_ms is nan"),
        (entry(min_budget_ms="3_600_001"), "min_budget_ms is 3.6e+06"),
        (entry(min_budget_ms="6", max_budget_ms="5"), "min_budget_ms 6 is over max_budget_ms 5"),
        (entry(requests_per_minute="-1"), "requests_per_minute is -1"),
        (entry(requests_per_minute='"fast"'), "keys[0].requests_per_minute"),
        (entry(burst="3"), "give both"),
        (entry(requests_per_minute="5", burst="0"), "burst is 0"),
        (entry() + entry(key='"other"'), "keys[0] and keys[1] have the same name"),
        (entry() + entry(name='"b"'), "keys[0] and keys[1] have the same key"),
        (
            entry(key='"SECRET"') + entry(name='"b"', key=f'"sha256:{hashlib.sha256(b"SECRET").hexdigest()}"'),
            "same key",
        ),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(KeysFileError) as caught:
        read_keys(file)
    assert told in caught.value.message
    assert str(file) in caught.value.message
    assert "SECRET" not in caught.value.message
    assert isinstance(caught.value, StartupError)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="cannot read"):
        read_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(KeysFileError, match="no TOML"):
        read_keys(tmp_path / "binary")


def test_no_key_is_kept(path: Path) -> None:
    keys = KeyRing(("third",), path)
    for key in ("plain", "third", hashlib.sha256(b"third").hexdigest(), repr(hashlib.sha256(b"third").digest())):
        assert key not in repr(vars(keys))


def test_every_key_is_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time must not tell which key came close, or first."""
    keys, compared = KeyRing(("third", "fourth"), path), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr("sortserve.server.keys.hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    for given in ("hashed", "plain", "third", "x", "y" * 1000):
        compared.clear()
        assert (keys.find(given) is None) == (given[0] in "xy")
        assert compared == [(32, 32)] * 4


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text()
    (tmp_path / "keys.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    keys = KeyRing((), tmp_path / "keys.toml")
    found = keys.find("test")
    assert found is not None
    assert (found.name, found.bounds) == ("batch", Bounds(200.0, 5000.0, "d12"))
    assert keys.find("a-key-in-plain-text") is not None


# --- bounds


@pytest.mark.parametrize(
    ("asked", "applied"), [(None, 5000.0), (100.0, 200.0), (200.0, 200.0), (700.0, 700.0), (9000.0, 5000.0)]
)
def test_narrowing(asked: float | None, applied: float) -> None:
    assert Bounds(200.0, 5000.0).narrow(asked) == applied


def test_no_bounds_narrow_nothing() -> None:
    assert Bounds().narrow(None) is None
    assert Bounds().narrow(3_600_000.0) == 3_600_000.0
    assert Bounds(min_budget_ms=5.0).narrow(None) is None


async def test_bounds_apply_and_are_told(path: Path) -> None:
    backend = FakeBackend()
    options = ServerOptions(api_keys=("free",), keys_file=path, default_latency_budget_ms=100.0)
    async with open_client(backend, options) as client:

        async def ask(key: str, **headers: str) -> httpx.Response:
            answer = await client.post("/v1/completions", json=ASK, headers=bearer(key, **headers))
            assert answer.status_code == 200, answer.text
            return answer

        small = await ask("hashed", **{"X-Latency-Budget-Ms": "5"})
        large = await ask("hashed", **{"X-Latency-Budget-Ms": "10s", "X-Submodel-Floor": "d4"})
        await ask("hashed")
        first = await ask("hashed", **{"X-Latency-Budget-TTFT-Ms": "30", "X-Latency-Budget-Policy": "cut"})
        await ask("free", **{"X-Latency-Budget-Ms": "5"})
    assert (small.headers["X-Latency-Budget-Ms"], large.headers["X-Latency-Budget-Ms"]) == ("200", "5000")
    assert small.json()["sortserve"]["budget_ms"] == 200.0
    assert first.headers["X-Latency-Budget-TTFT-Ms"] == "30"
    asked = [(request.budget, request.floor) for request in backend.requests]
    assert asked == [
        (Budget(200.0), "d4-w50"),
        (Budget(5000.0), "d4"),
        (Budget(200.0), "d4-w50"),  # the default, narrowed
        (Budget(5000.0, 30.0, None, "cut"), "d4-w50"),
        (Budget(5.0), None),
    ]


async def test_a_policy_needs_no_budget_where_the_key_has_one(path: Path) -> None:
    async with open_client(FakeBackend(), ServerOptions(keys_file=path)) as client:
        strict = {"X-Latency-Budget-Policy": "strict"}
        assert (await client.post("/v1/completions", json=ASK, headers=bearer("hashed", **strict))).status_code == 200
        assert (await client.post("/v1/completions", json=ASK, headers=bearer("plain", **strict))).status_code == 400


async def test_pin_below_the_floor_is_refused(path: Path) -> None:
    backend = FakeBackend()
    async with open_client(backend, ServerOptions(keys_file=path)) as client:
        for body in (ASK | {"submodel": "d2"}, ASK | {"model": "fake:d2"}):
            answer = await client.post("/v1/completions", json=body, headers=bearer("hashed"))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "submodel")
            assert "d4-w50" in answer.json()["error"]["message"]
        above = await client.post("/v1/completions", json=ASK | {"submodel": "d4"}, headers=bearer("hashed"))
        assert above.status_code == 200
    assert len(backend.requests) == 1


async def test_key_in_both_has_bounds(path: Path) -> None:
    backend = FakeBackend()
    async with open_client(backend, ServerOptions(api_keys=("hashed",), keys_file=path)) as client:
        await client.post("/v1/completions", json=ASK, headers=bearer("hashed"))
        assert (await client.post("/v1/completions", json=ASK)).status_code == 401
    assert backend.requests[0].budget == Budget(5000.0)


async def test_unknown_floor_fails_the_start(path: Path) -> None:
    """And the engine that was loaded by then is ended: it was left to run."""
    path.write_text(KEYS.replace("d4-w50", "d3"))
    backend = FakeBackend()
    async with open_client(backend, ServerOptions(keys_file=path)) as client:
        failure = state_of(client).failure
        assert isinstance(failure, KeysFileError)
        assert "keys[0] (batch): floor: no sub-model 'd3'; this ladder has: d2, d4-w50, d4" in failure.message
        assert not backend.drained
    assert len(backend.drained) == 1


# --- rates


def test_bucket() -> None:
    now = [100.0]
    bucket = Bucket(30.0, 2, lambda: now[0])
    assert [bucket.take(), bucket.take(), bucket.take()] == [0.0, 0.0, 2.0]
    now[0] += 1.5
    assert bucket.take() == 0.5
    now[0] += 0.5
    assert bucket.take() == 0.0
    assert bucket.take() == 2.0
    now[0] += 1e6
    assert [bucket.take() > 0 for _ in range(3)] == [False, False, True]
    with pytest.raises(RateLimitedError, match="30 requests a minute, 2 at once") as caught:
        Key(b"", bucket=bucket).spend()
    assert caught.value.retry_after == 2.0


def test_burst_defaults_to_ten_seconds(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    for rate, burst in (("600", 100), ("1", 1)):
        file.write_text(entry(requests_per_minute=rate))
        bucket = read_keys(file)[0].bucket
        assert bucket is not None
        assert bucket.burst == burst


async def test_rate_is_a_429(path: Path) -> None:
    backend = FakeBackend()
    async with open_client(backend, ServerOptions(keys_file=path)) as client:
        answers = [await client.post("/v1/completions", json=ASK, headers=bearer("plain")) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
        assert 0 < int(answers[2].headers["Retry-After"]) <= 30
        assert 0 < int(answers[2].headers["retry-after-ms"]) <= 30_000
        assert answers[2].headers["X-Dropped-Reason"] == "rejected-rate-limited"
        assert (await client.post("/tokenize", json={"prompt": "x"}, headers=bearer("plain"))).status_code == 429
        # looking costs nothing, and other keys have rates of their own
        assert (await client.get("/v1/models", headers=bearer("plain"))).status_code == 200
        assert (await client.post("/v1/completions", json=ASK, headers=bearer("hashed"))).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'sortserve_requests_dropped_total{model="fake",reason="rate_limited"} 2.0' in metrics
    assert 'finish_reason="none",model="fake",status="429",submodel="none"} 1.0' in metrics
    assert len(backend.requests) == 3


# --- reading it again


async def test_reload(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(delay=0.01)
    async with open_client(backend, ServerOptions(keys_file=path)) as client:
        state = state_of(client)

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers=bearer(key))).status_code

        for _ in range(2):
            await client.post("/v1/completions", json=ASK, headers=bearer("plain"))
        running = asyncio.create_task(client.post("/v1/completions", json=ASK, headers=bearer("hashed")))
        while not backend.running:
            await asyncio.sleep(0)
        path.write_text(KEYS.split('[[keys]]\nname = "batch"')[0] + "[[keys]]" + KEYS.split("[[keys]]")[2])
        state.reload_keys()
        assert (await status("hashed"), await status("plain")) == (401, 200)
        assert (await running).status_code == 200
        # the bucket goes on as empty as it was
        assert (await client.post("/v1/completions", json=ASK, headers=bearer("plain"))).status_code == 429
        for broken, told in (("[[keys]", "line 1"), (entry(floor='"d9"'), "d9"), ("", "keys")):
            path.write_text(broken)
            caplog.clear()
            state.reload_keys()
            assert await status("plain") == 200
            assert told in caplog.text
            levels = [record.levelno for record in caplog.records if record.name == "sortserve.server"]
            assert levels[0] == logging.ERROR
        path.unlink()
        state.reload_keys()
        assert await status("plain") == 200


async def test_names_are_logged_and_keys_never(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sortserve.engine.logs import TextFormatter

    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(TextFormatter())
    async with open_client(FakeBackend(), ServerOptions(api_keys=("k-free",), keys_file=path)) as client:
        for key in ("hashed", "k-free", "k-unknown", *["plain"] * 3):
            await client.post("/v1/completions", json=ASK, headers=bearer(key))
        state_of(client).reload_keys()
        metrics = (await client.get("/metrics")).text
    assert caplog.text.count("key=batch") == 1
    assert caplog.text.count("key=slow") == 3
    for key in ("hashed", "k-free", "k-unknown", "plain", hashlib.sha256(b"hashed").hexdigest()):
        assert key not in caplog.text
        assert key not in metrics
    assert "batch" not in metrics


def test_a_floor_of_the_key_never_lowers_one() -> None:
    """Without a budget the full model answers; naming the key's floor made it the floor of such requests too."""
    bounds = Bounds(floor="d4-w50")
    for body, expected in (
        ({}, None),
        ({"latency_budget_ms": 100.0}, "d4-w50"),
        ({"quality_floor": 0.5}, "d4-w50"),
        ({"submodel_floor": "d2"}, "d4-w50"),
        ({"submodel_floor": "d4"}, "d4"),
    ):
        asked = CompletionRequest.model_validate({"prompt": "x", **body})
        assert read_terms(Headers({}), asked, ladder(), bounds=bounds).floor == expected, body
