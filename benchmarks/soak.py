"""`python -m benchmarks.soak [--seconds 900]` (`make soak`): mixed traffic against the bundled model for a quarter of an
hour; resident memory of both processes must stay flat and the log clean. Writes results/soak.json.

The traffic: streamed and whole answers, completions and chat, budgets of all kinds, pins, schemas, bad requests, clients
that leave, probes. A fixed number of clients, each as fast as it is answered.
"""

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import numpy as np
from scipy import stats

from benchmarks.common import report
from tests.server.real_server import Server, resident_bytes, serving

CLIENTS = 12
WARM_SHARE = 0.3  # of the time, before the slope is taken: caches fill
EVERY_SECONDS = 2.0
SEED = 20_260
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@dataclass
class Traffic:
    """What was sent and what came back, by kind and status."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def take(self, kind: str, status: int, expected: tuple[int, ...], text: str = "") -> None:
        """Count an answer; one that is not expected is kept."""
        self.answers[kind, status] += 1
        if status not in expected:
            self.wrong.append(f"{kind}: {status} {text[:200]}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=900.0)
    seconds = parser.parse_args().seconds
    print(f"{CLIENTS} clients, {seconds:.0f} s, seed {SEED}")
    with serving() as server:
        traffic, samples = asyncio.run(_run(server, seconds))
        log = [line for line in server.log if " ERROR " in line or " WARNING " in line or "Traceback" in line]
        # the bundled model is measured, so nothing is worth a warning
    figures: dict[str, object] = {"seconds": seconds, "requests": sum(traffic.answers.values())}
    checks = {"no error or warning in the log": not log, "no unexpected answer": not traffic.wrong}
    for name, column in (("http", 1), ("engine", 2)):
        slope, error, mean = _slope([(row[0], row[column]) for row in samples], WARM_SHARE * seconds)
        thirds = [_slope(list(part), 0.0)[0] / 1024 for part in _thirds(samples, column, WARM_SHARE * seconds)]
        print(
            f"  {name}: {mean / 2**20:.1f} MiB, slope {slope / 1024:+.1f} +- {error / 1024:.1f} KiB a minute (95 %), ",
            end="",
        )
        print("by thirds " + ", ".join(f"{third:+.1f}" for third in thirds))
        figures[f"{name}_mib"], figures[f"{name}_kib_per_minute"] = mean / 2**20, slope / 1024
        figures[f"{name}_kib_per_minute_interval"] = error / 1024
        figures[f"{name}_kib_per_minute_by_thirds"] = thirds
        checks[f"{name}: memory slope under 0.02 % a minute"] = slope <= 0.0002 * mean
    for (kind, status), count in sorted(traffic.answers.items()):
        print(f"  {kind:10s} {status}: {count}")
    for line in [*log[:5], *traffic.wrong[:5]]:
        print("  !", line.rstrip())
    report("soak", figures, checks)


async def _run(server: Server, seconds: float) -> tuple[Traffic, list[tuple[float, ...]]]:
    """The traffic, and (seconds, bytes of the HTTP process, bytes of the engine) every two seconds."""
    traffic = Traffic()
    samples: list[tuple[float, ...]] = []
    began = time.monotonic()
    pids = (server.process.pid, server.engine_pid)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        clients = [asyncio.create_task(_client(client, traffic, SEED + n, began + seconds)) for n in range(CLIENTS)]
        while time.monotonic() < began + seconds:
            await asyncio.sleep(EVERY_SECONDS)
            samples.append((time.monotonic() - began, *map(float, map(resident_bytes, pids))))
        await asyncio.gather(*clients)
        settled = await client.get("/metrics")
    for gauge in ("requests_running", "requests_waiting"):
        if f'sortserve_{gauge}{{model="bundled"}} 0.0' not in settled.text:
            traffic.wrong.append(f"{gauge} is not 0 at the end")
    return traffic, samples


async def _client(client: httpx.AsyncClient, traffic: Traffic, seed: int, until: float) -> None:
    draw = random.Random(seed)
    for number in itertools.count():
        if time.monotonic() >= until:
            return
        kind = draw.choices(["whole", "stream", "chat", "schema", "leave", "bad", "probe"], [5, 8, 3, 1, 3, 1, 1])[0]
        await _ask(client, traffic, kind, draw, f"{seed}-{number}")


async def _ask(client: httpx.AsyncClient, traffic: Traffic, kind: str, draw: random.Random, name: str) -> None:
    words = " ".join(draw.choice(["king", "sea", "night", "the", "old", "ship"]) for _ in range(draw.randrange(1, 80)))
    asked: dict[str, object] = {"max_tokens": draw.randrange(1, 120), "seed": draw.randrange(1000), "user": name}
    headers = {}
    if draw.random() < 0.5:
        headers["X-Latency-Budget-Ms"] = str(draw.choice([50, 200, 500, 2000]))
        headers["X-Latency-Budget-Policy"] = draw.choice(["best-effort", "cut", "strict"])
    elif draw.random() < 0.3:
        headers["X-Submodel"] = draw.choice(["d2-w50", "d4-w50", "d6-w50"])
    refusals = (400, 429) if headers.get("X-Latency-Budget-Policy") == "strict" else ()
    if kind == "probe":
        path = draw.choice(["/health", "/metrics", "/v1/submodels", "/v1/models", "/"])
        traffic.take(kind, (await client.get(path)).status_code, (200,))
    elif kind == "bad":
        answer = await client.post("/v1/completions", json={"prompt": words, "temperature": draw.choice([-1, "x", 9])})
        traffic.take(kind, answer.status_code, (400,), answer.text)
    elif kind == "leave" or kind == "stream":
        async with client.stream(
            "POST", "/v1/completions", json=asked | {"prompt": words, "stream": True}, headers=headers
        ) as response:
            last, lines = "", 0
            async for line in response.aiter_lines():
                last, lines = line or last, lines + 1
                if kind == "leave" and lines > 5:
                    break
            whole = kind == "leave" or response.status_code != 200 or last == "data: [DONE]"
            traffic.take(kind, response.status_code if whole else 0, (200, *refusals), last)
    else:
        more: dict[str, object] = {"prompt": words}
        if kind == "schema":
            more["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        path = "/v1/completions"
        if kind == "chat":
            more, path = {"messages": [{"role": "user", "content": words}]}, "/v1/chat/completions"
        answer = await client.post(path, json=asked | more, headers=headers)
        traffic.take(kind, answer.status_code, (200, *refusals), answer.text)


def _thirds(samples: list[tuple[float, ...]], column: int, after: float) -> list[list[tuple[float, float]]]:
    """What was sampled later than `after` seconds, in three parts: growth that ends is no leak."""
    points = [(row[0], row[column]) for row in samples if row[0] >= after]
    size = len(points) // 3
    return [points[:size], points[size : 2 * size], points[2 * size :]]


def _slope(points: list[tuple[float, float]], after: float) -> tuple[float, float, float]:
    """Bytes a minute with half its 95 % interval, and the mean, of what was sampled later than `after` seconds.

    Theil and Sen's estimator: one step up or down, as of an arena given back, does not tilt it.
    """
    times, values = np.array([point for point in points if point[0] >= after]).T
    slope, _, low, high = stats.theilslopes(values, times / 60.0, 0.95)
    return float(slope), float((high - low) / 2), float(values.mean())


if __name__ == "__main__":
    main()
