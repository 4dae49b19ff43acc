"""What a server goes through: engines killed and stopped, too little memory, clients that read slowly or leave."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundled import FLOOR, MIDDLE
from tests.server.real_server import Server, children, resident_bytes, serving

KILLS = int(os.environ.get("SORTSERVE_KILLS", "6"))  # 20 took two minutes
NUM_STREAMS = 32
TERMINAL_SECONDS = 2.0  # the longest that a client waits for its last event after its engine was killed
LOAD_SECONDS_MORE = 5.0


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server keeps its sockets: nothing may be left there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


async def streamed(client: httpx.AsyncClient, **fields: Any) -> tuple[list[dict[str, Any]], float]:
    """All events of an answer but `[DONE]`, which must be the last one and come once, and when that was."""
    asked = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True} | fields
    events: list[dict[str, Any]] = []
    done = 0
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        async for line in response.aiter_lines():
            assert not done or not line, f"after the end: {line}"
            if line == "data: [DONE]":
                done += 1
            elif line:
                events.append(json.loads(line.removeprefix("data: ")))
    assert done == (response.status_code == 200)
    return events, time.monotonic()


def is_terminal(event: dict[str, Any]) -> bool:
    return "error" in event or event["choices"][0]["finish_reason"] is not None


async def ready_again(client: httpx.AsyncClient, seconds: float) -> None:
    """Wait until a request succeeds."""
    deadline = time.monotonic() + seconds
    while True:
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        if answer.status_code == 200:
            return
        assert answer.json()["error"]["code"] == "engine_failed", answer.text
        assert "Retry-After" in answer.headers
        assert time.monotonic() < deadline, f"no answer within {seconds:.1f} s"
        await asyncio.sleep(0.05)


def nothing_left(server: Server, engines: set[int], sockets: Path) -> None:
    """After the server has ended: no engine lives, no socket lies there."""
    assert server.process.wait(60) == 0, "".join(server.log)
    for pid in engines:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(sockets.glob("sortserve-*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_engines_killed_under_32_streams(sockets: Path) -> None:
    """Again and again: every client hears one end, the last of them within 2 s, the next request succeeds within the load
    time and 5 s, and at the end nothing is left behind.

    The times are those of the median round: a machine that is busy elsewhere may stall any one of them, and a server
    that is late is late every time. The load time is looked at every fifth round: one taken in a quiet moment before the
    first (2.1 s) failed this test when the machine was busy later (8.8 s for the median return).
    """
    with serving() as server:
        loads = []
        engines = {server.engine_pid}
        slowest_ends, returns = [], []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            for round_number in range(KILLS):
                if round_number % 5 == 0:
                    began = time.monotonic()
                    with serving() as other:
                        loads.append(time.monotonic() - began)
                        other.process.send_signal(signal.SIGTERM)
                        assert other.process.wait(60) == 0
                first_tokens = server.metric("generation_tokens_total")
                tasks = [asyncio.create_task(streamed(client)) for _ in range(NUM_STREAMS)]
                while server.metric("generation_tokens_total") < first_tokens + 2 * NUM_STREAMS:
                    await asyncio.sleep(0.02)
                assert not any(task.done() for task in tasks)
                killed = time.monotonic()
                os.kill(server.engine_pid, signal.SIGKILL)
                ends = await asyncio.wait_for(asyncio.gather(*tasks), 120)
                for events, _ in ends:
                    assert [is_terminal(event) for event in events] == [False] * (len(events) - 1) + [True]
                    assert events[-1]["error"]["code"] == "engine_failed"
                slowest_ends.append(max(at for _, at in ends) - killed)
                assert (await client.get("/health")).status_code == 200
                await ready_again(client, 90)
                returns.append(time.monotonic() - killed)
                engines.add(server.engine_pid)
                assert server.metric("engine_restarts_total") == round_number + 1
        print(f"slowest ends {max(slowest_ends):.2f} s, slowest return {max(returns):.1f} s, loads {max(loads):.1f} s")
        assert statistics.median(slowest_ends) < TERMINAL_SECONDS
        assert statistics.median(returns) < max(loads) + LOAD_SECONDS_MORE
        assert len(engines) == KILLS + 1
        assert "Traceback" not in "".join(server.log)
        server.process.send_signal(signal.SIGTERM)
        nothing_left(server, engines, sockets)


async def test_an_engine_that_is_stopped_is_replaced(sockets: Path) -> None:
    """By SIGSTOP: no step ends, so it is taken for dead after --engine-timeout."""
    with serving("--engine-timeout", "2") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            stopped = server.engine_pid
            task = asyncio.create_task(streamed(client))
            while server.metric("requests_running") < 1:
                await asyncio.sleep(0.02)
            os.kill(stopped, signal.SIGSTOP)
            events, _ = await asyncio.wait_for(task, 60)
            assert "no step ended for 2 s" in events[-1]["error"]["message"]
            assert (await client.get("/ready")).status_code == 503
            await ready_again(client, 90)
        engines = {stopped, server.engine_pid}
        server.process.send_signal(signal.SIGTERM)
        nothing_left(server, engines, sockets)


def test_a_second_signal_ends_it_at_once(sockets: Path) -> None:
    """While an answer is under way that would take longer."""
    with serving() as server:
        engine = server.engine_pid
        asked = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while server.is_ready:
                pass
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            # the end of the answers is not among what it said before it was cut off
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert not [line for line in lines if '"finish_reason":"length"' in line]
        deadline = time.monotonic() + 60
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() < deadline, "the engine outlives the server"
            time.sleep(0.02)
        assert not list(sockets.glob("sortserve-*"))


async def test_little_memory_and_many_requests() -> None:
    """K/V memory for three sequences, 64 requests, some pinned: all finish, each as if it were alone."""
    # 3 sequences of 128 tokens in 8 layers, and the exit states of one refill chunk of 64
    flags = ("--max-model-len", "128", "--max-batch-tokens", "64", "--kv-memory", "1400KiB")
    rng = random.Random(3)
    print("seed 3")
    requests = [
        {
            "prompt": [rng.randrange(5, 2000) for _ in range(rng.randrange(1, 60))],
            "max_tokens": rng.randrange(5, 60),
            "model": rng.choice(["bundled", "bundled", f"bundled:{MIDDLE}", f"bundled:{FLOOR}"]),
            "seed": number,
            "temperature": rng.choice([0.0, 1.0]),
            "ignore_eos": True,
        }
        for number in range(64)
    ]

    async def ask(client: httpx.AsyncClient, asked: dict[str, Any]) -> tuple[str, str]:
        answer = await client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]

    with serving(*flags) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            together = await asyncio.gather(*(ask(client, asked) for asked in requests))
            assert server.metric("preemptions_total") > 0, "memory was never short"
            alone = [await ask(client, asked) for asked in requests]
        assert {reason for _, reason in together} == {"length"}
        same = sum(one == other for one, other in zip(together, alone, strict=True))
        assert same >= 62, "a near-tie may turn with the order of sums, float32 or not"
        assert server.metric("requests_running") == server.metric("requests_waiting") == 0


# ---- clients


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--no-prefix-cache") as started:
        yield started


def settled(server: Server) -> None:
    """Wait until nothing runs; then no page may be in use."""
    deadline = time.monotonic() + 90
    while server.metric("requests_running") + server.metric("requests_waiting"):
        assert time.monotonic() < deadline, "an answer that nobody reads goes on"
        time.sleep(0.02)
    assert server.metric("kv_cache_usage_ratio") == 0


def raw_request(max_tokens: int) -> bytes:
    body = json.dumps({"prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def connect(server: Server, receive_bytes: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    host, port = server.url.removeprefix("http://").split(":")
    made.settimeout(30)
    made.connect((host, int(port)))
    return made


def test_slow_readers_hold_nobody_up(server: Server) -> None:
    """Eight clients that read nothing while 900 tokens are made for each: others are answered, the pages come back,
    and what was made for them is all there when they read at last."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server, 4096)) for _ in range(8)]
        for client in slow:
            client.sendall(raw_request(900))
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 20}, timeout=30)
        assert answer.status_code == 200
        settled(server)
        for client in slow:
            content = b""
            while b"data: [DONE]" not in content:
                received = client.recv(65536)
                assert received, "closed before the end"
                content += received
            assert content.count(b'"text":') >= 500, "tokens of several bytes share chunks, but most have their own"


def test_half_closed_sockets(server: Server) -> None:
    """A client that ends its own side has left: its answer is aborted, and nothing of it stays."""
    before = server.metric("generation_tokens_total")
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.sendall(raw_request(900))
        assert client.recv(10)
        client.shutdown(socket.SHUT_WR)
    settled(server)
    assert server.metric("generation_tokens_total") - before < 20 * 900
    for client in clients:
        client.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_ten_thousand_aborted_requests(server: Server) -> None:
    """Left before, during and after the first token: pages exact, memory of both processes flat within 2 %.

    After 5,000 that fill what is kept (compiled products above all). Resident MiB of the engine after 1,500, 4,000, 6,500,
    and so on to 16,500: 418, 423, 427, 427, 429, 431, 431. Counted from 1,500 on the growth was 2.4 % in CI.
    """
    rng = random.Random(5)

    async def leave() -> None:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw_request(900))
        await writer.drain()
        for _ in range(rng.randrange(3)):
            await reader.read(200)
        writer.transport.abort()

    async def many(count: int) -> None:
        left = iter(range(count))

        async def worker() -> None:
            for _ in left:
                await leave()

        await asyncio.gather(*(worker() for _ in range(24)))

    pids = (server.process.pid, server.engine_pid)
    await many(5000)
    settled(server)
    before = [resident_bytes(pid) for pid in pids]
    await many(10_000)
    settled(server)
    after = [resident_bytes(pid) for pid in pids]
    growth = [now / then - 1 for now, then in zip(after, before, strict=True)]
    print("resident MiB before and after", [(a >> 20, b >> 20) for a, b in zip(before, after, strict=True)])
    assert max(growth) <= 0.02, growth
    assert children(server.process.pid) == [pids[1]], "the engine is the same one"
