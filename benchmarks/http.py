"""What HTTP adds to the engine, with the bundled model: time to the first token and per token, alone; 200 streams at
once; and `/health` while the model is busy.

One answer over HTTP and one from an engine in this process in turn. The client is a plain socket, so that what is
measured is the server and not a client library.
"""

import asyncio
import json
import socket
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import alternate, median, report
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.protocol import GenerateRequest, TokenEvent
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import Tokenizer
from sortserve.server.cli import BUNDLED
from tests.server.real_server import serving

PROMPT = "Once upon a time there was a king who"
NUM_TOKENS = 64
ROUNDS = 100
STREAMS = 200
KV_BYTES = 256 << 20


def run(_: Path) -> None:
    """Run all; the model that is served is always the bundled one."""
    torch.set_num_threads(1)  # as the engine chooses for a model of this size
    config = EngineConfig(BUNDLED, dtype="float32", kv_bytes=KV_BYTES, prefix_cache=False)
    engine = Engine.load(config)
    with serving("--kv-memory", str(KV_BYTES), "--no-prefix-cache") as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        first, each, engine_first, engine_each = _overhead(engine, address)
        ordered, tokens_per_second, health = asyncio.run(_many(address))
    added_first, added_each = median(first) - median(engine_first), median(each) - median(engine_each)
    print(
        f"  alone: first token {median(first):.2f} ms, engine alone {median(engine_first):.2f}: {added_first:+.2f} ms"
    )
    print(f"         each token  {median(each):.2f} ms, engine alone {median(engine_each):.2f}: {added_each:+.3f} ms")
    print(f"  {STREAMS} streams: {tokens_per_second:.0f} tokens/s; /health p50 {median(health):.1f} ms, ", end="")
    p99 = float(np.quantile(health, 0.99))
    print(f"p99 {p99:.1f} ms of {len(health)}")
    figures: dict[str, object] = {
        "first_token_ms": median(first),
        "engine_first_token_ms": median(engine_first),
        "added_to_first_token_ms": added_first,
        "added_per_token_ms": added_each,
        "per_token_ms": median(each),
        "streams": STREAMS,
        "streams_tokens_per_second": tokens_per_second,
        "health_p99_ms": p99,
    }
    checks = {
        "HTTP adds at most 2 ms to the first token": added_first <= 2.0,
        "HTTP adds at most 0.5 ms per token": added_each <= 0.5,
        f"{STREAMS} streams without a chunk dropped or out of order": ordered,
        "/health p99 under 100 ms while the model is busy": p99 < 100.0,
    }
    report("http", figures, checks)


def _overhead(engine: Engine, address: tuple[str, int]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Milliseconds to the first token and per token after it: over HTTP, and of the engine alone."""
    prompt = tuple(Tokenizer.load(BUNDLED).encode(PROMPT))
    each: list[float] = []
    engine_each: list[float] = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def over_http() -> float:
            times = _answer_times(connection)
            each.append(1e3 * (times[-1] - times[1]) / (len(times) - 2))
            return 1e3 * (times[1] - times[0])

        def alone() -> float:
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            began = time.perf_counter()
            engine.scheduler.add(GenerateRequest(f"alone-{began}", prompt, sampling, time.monotonic()))
            times = []
            while engine.scheduler.has_work:
                made = any(isinstance(event, TokenEvent) for event in engine.step())
                times += [time.perf_counter()] * made
            engine_each.append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
            return 1e3 * (times[0] - began)

        first, engine_first = alternate([over_http, alone], ROUNDS)
    return first, each, engine_first, engine_each


def _answer_times(connection: socket.socket) -> list[float]:
    """When the request was sent, and when each chunk was there."""
    times = [time.perf_counter()]
    connection.sendall(_request())
    content = b""
    while not content.endswith(b"0\r\n\r\n"):  # the end of the chunked body
        received = connection.recv(65536)
        assert received, "the server closed the connection"
        content += received
        times += [time.perf_counter()] * received.count(b'data: {"id"')
    assert content.count(b'"finish_reason":"length"') == 1, content[-500:]
    return times


def _request(**more: object) -> bytes:
    asked = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True} | more
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def _many(address: tuple[str, int]) -> tuple[bool, float, list[float]]:
    """All streams at once: whether every one was whole and in order, tokens a second, and `/health` times in ms."""
    health: list[float] = []
    over = asyncio.Event()
    watching = asyncio.create_task(_watch_health(address, over, health))
    began = time.perf_counter()
    whole = await asyncio.gather(*(_stream(address) for _ in range(STREAMS)))
    seconds = time.perf_counter() - began
    over.set()
    await watching
    return all(whole), STREAMS * NUM_TOKENS / seconds, health


async def _stream(address: tuple[str, int]) -> bool:
    """One answer with log-probabilities: `text_offset` of every token says where its text must begin."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(_request(logprobs=0, stream_options={"include_usage": True}))
    text, tokens = "", 0
    offsets: list[int] = []
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                offsets += choice["logprobs"]["text_offset"] if choice["logprobs"] else []
                text += choice["text"]
            tokens = chunk["usage"]["completion_tokens"] if chunk["usage"] else tokens
    writer.close()
    in_order = all(a <= b for a, b in pairwise(offsets)) and offsets[:1] == [0] and offsets[-1] <= len(text)
    return in_order and len(offsets) == tokens == NUM_TOKENS


async def _watch_health(address: tuple[str, int], over: asyncio.Event, health: list[float]) -> None:
    """Ask every 20 ms, over one connection."""
    reader, writer = await asyncio.open_connection(*address)
    while not over.is_set():
        began = time.perf_counter()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        [length] = [
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        ]
        await reader.readexactly(length)
        health.append(1e3 * (time.perf_counter() - began))
        await asyncio.sleep(0.02)
    writer.close()
