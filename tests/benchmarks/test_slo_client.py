"""The client process's loop against a small server of its own, and what it makes of bytes. No time is asserted but that
nothing leaves early."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks.slo import load
from benchmarks.slo.client import closed_loop, send
from benchmarks.slo.http_client import Answer
from benchmarks.slo.reader import Reader
from benchmarks.slo.wire import Ask, Outcome, Plan
from sortserve.engine.budget import Budget
from sortserve.engine.simulator.traces import BudgetMix, Trace, Unloaded

HEAD = b"HTTP/1.1 200 OK\r\nX-Submodel: d4\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'1f\r\ndata: {"choices":[{"text":"a","finish_reason":null}]}\n\n\r\n'
LAST = b'1f\r\ndata: {"choices":[{"text":"","finish_reason":"length"}]}\n\n\r\n'
DONE = b'9\r\ndata: {"choices":[],"sortserve":{}}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n'
REFUSAL = b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 13\r\nRetry-After: 1\r\n\r\n{"error": {}}'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_is_read_however_it_is_cut(size: int) -> None:
    stream = HEAD + TEXT + TEXT + LAST + DONE
    answer, moments = Answer(), {}
    for place in range(0, len(stream), size):
        complete = answer.take(stream[place : place + size], float(place))
        assert complete is (place + size >= len(stream)), place
        moments[place + size] = (answer.first, answer.last)
    assert (answer.status, answer.headers["x-submodel"]) == (200, "d4")
    assert answer.first is not None
    assert answer.last is not None
    first_mark, last_mark = stream.index(b"data: {") + 7, stream.index(b'"finish_reason":"') + 17
    assert first_mark - size <= answer.first < first_mark + size
    assert last_mark - size <= answer.last < last_mark + size
    assert answer.tail.endswith(DONE)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_refusal_has_a_length(size: int) -> None:
    answer = Answer()
    ends = [answer.take(REFUSAL[place : place + size], 0.0) for place in range(0, len(REFUSAL), size)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert (answer.status, answer.first, answer.tail.strip()) == (429, None, b'{"error": {}}')


@dataclass
class FakeServer:
    """Answers as `answer` says, given the request's number; None: never. `asked` has the requests as they came."""

    answer: Callable[[int], bytes | None]
    port: int = 0
    connections: int = 0
    asked: list[int] = field(default_factory=list)
    tasks: set[asyncio.Task[None] | None] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(task := asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                [length] = [line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
                number = json.loads(await reader.readexactly(int(length)))["max_tokens"]
                self.asked.append(number)
                answer = self.answer(number)
                if answer is not None:
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.tasks.discard(task)


def fake(answer: Callable[[int], bytes | None]) -> AbstractAsyncContextManager[FakeServer]:
    @asynccontextmanager
    async def serving():  # type: ignore[no-untyped-def]
        made = FakeServer(answer)
        server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        made.port = server.sockets[0].getsockname()[1]
        async with server:
            yield made
            while made.tasks:  # the client has closed every connection; each is heard of
                await asyncio.sleep(0.01)

    return serving()


def asks(number: int, apart: float = 0.002) -> list[Ask]:
    """Requests whose `max_tokens` is their number."""
    return [Ask(place, apart * place, load.request([1, 2], place, {})) for place in range(number)]


async def replay(port: int, asks: list[Ask], seconds: float) -> list[Outcome]:
    """Both halves of the open loop, the sender in a thread instead of a process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plan = Plan(port, asks, "open", 0, seconds, 0)
    with ours, theirs:
        sending = asyncio.create_task(asyncio.to_thread(send, plan, ours))
        outcomes = await Reader(plan, theirs).run()
        await sending
    return outcomes


async def test_the_loop_is_open() -> None:
    """Not one of the first 30 requests is answered; all leave nevertheless, in order, none before it is due."""
    async with fake(lambda number: None if number < 30 else HEAD + TEXT + LAST + DONE) as server:
        outcomes = await replay(server.port, asks(40), 1.0)
        assert sorted(server.asked) == list(range(40))
    assert [outcome.number for outcome in sorted(outcomes, key=lambda outcome: outcome.sent)] == list(range(40))
    assert all(outcome.sent >= outcome.due for outcome in outcomes)
    complete = {outcome.number for outcome in outcomes if outcome.complete}
    assert complete == set(range(30, 40)), "the others are given up, and come back as broken"
    assert all(outcome.status == 0 for outcome in outcomes if outcome.number < 30)
    assert all(outcome.sent <= outcome.first <= outcome.last for outcome in outcomes if outcome.complete)


async def test_a_run_ends_when_all_is_answered() -> None:
    async with fake(lambda number: REFUSAL if number % 2 else HEAD + TEXT + LAST + DONE) as server:
        outcomes = await asyncio.wait_for(replay(server.port, asks(20, 0.01), 600.0), 60)
    assert {outcome.number: outcome.status for outcome in outcomes} == {n: 429 if n % 2 else 200 for n in range(20)}


async def test_no_server() -> None:
    async with fake(lambda number: b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n") as server:
        port = server.port
        outcomes = await replay(port, asks(3, 0.05), 60.0)
        assert [outcome.status for outcome in outcomes] == [200, 200, 200]
        assert not any(outcome.complete for outcome in outcomes)
    outcomes = await replay(port, asks(3), 60.0)
    assert [outcome.status for outcome in outcomes] == [0, 0, 0]


async def test_a_closed_loop_asks_as_it_is_answered() -> None:
    async with fake(lambda number: None if number == 3 else HEAD + TEXT + LAST + DONE) as server:
        outcomes = await closed_loop(Plan(server.port, asks(5), "closed", 2, 0.5, 0))
        assert server.connections == 2
    numbers = [outcome.number for outcome in outcomes]
    assert numbers[:3] == [0, 1, 2]
    assert numbers.count(3) <= 2, "a client that is not answered asks nothing more"
    assert [outcome.status for outcome in outcomes if outcome.number == 3] == [0] * numbers.count(3)


def test_arrivals_are_at_the_rate_and_keep_their_bursts() -> None:
    trace = Trace(np.array([0.0, 5.0, 5.1, 9.0, 20.0, 21.0]), np.arange(6) + 1, np.arange(6) + 1)
    found = load.arrivals(trace, 1, 0.5, 8.0)
    assert found.num_prompt.tolist() == [2, 3, 4, 5]
    assert found.arrival == pytest.approx([0.0, 0.1 * 0.4, 4 * 0.4, 15 * 0.4])
    assert found.arrival[-1] == pytest.approx(6.0), "three gaps at a request every two seconds"
    with pytest.raises(ValueError, match="the trace has 6"):
        load.arrivals(trace, 1, 1.0, 8.0)


def test_closed_loops_draw_from_the_window_without_repeats() -> None:
    found = load.drawn(Trace(np.arange(50.0), np.arange(50), np.arange(50) + 100), 10, 30, seed=1)
    assert sorted(found.num_prompt.tolist()) == list(range(10, 40))
    assert found.num_prompt.tolist() != list(range(10, 40))
    assert (found.num_output - found.num_prompt == 100).all()
    assert len(load.drawn(Trace(np.arange(5.0), np.arange(5), np.arange(5)), 2, 30, seed=1)) == 3


def test_lengths_fit_into_the_context() -> None:
    trace = load.fitted(Trace(np.zeros(3), np.array([80, 8000, 1]), np.array([8000, 80, 1])), 0.125, 101)
    assert trace.num_prompt.tolist() == [10, 51, 1]
    assert trace.num_output.tolist() == [50, 10, 1]


def test_a_request_on_the_wire() -> None:
    trace = Trace(np.arange(60, dtype=np.float64) * 0.5, np.full(60, 20), np.full(60, 7))
    work = load.workload(trace, Unloaded(0.01, 0.001, 0.005), 1, BudgetMix(strict=0.5))
    made = load.asks(work, load.Texts(range(500)), 1)
    assert [ask.due for ask in made] == trace.arrival.tolist()
    prompts = set()
    for ask in made:
        head, _, body = ask.payload.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ") for line in lines[1:])
        asked = json.loads(body)
        assert lines[0] == "POST /v1/completions HTTP/1.1"
        assert int(headers["Content-Length"]) == len(body)
        assert (len(asked["prompt"]), asked["max_tokens"], asked["ignore_eos"]) == (20, 7, True)
        prompts.add(tuple(asked["prompt"][:16]))
        budget = load.budget_of(work, ask.number)
        sent = {name: value for name, value in headers.items() if name.startswith("X-Latency")}
        assert sent == load.budget_headers(budget)
        assert ("X-Latency-Budget-Policy" in headers) is (budget is not None)
    assert len(prompts) == 60, "no two prompts share a block"
    kinds = {"none": 0, "interactive": 0, "relaxed": 0}
    for kind in work.kind:
        kinds[kind] += 1
    assert min(kinds.values()) > 0


def test_a_budget_is_sent_as_it_is_judged() -> None:
    sent = load.budget_headers(Budget(ttft_ms=250.1239, tpot_ms=20.0, policy="strict"))
    assert sent == {
        "X-Latency-Budget-TTFT-Ms": "250.124",
        "X-Latency-Budget-TPOT-Ms": "20.000",
        "X-Latency-Budget-Policy": "strict",
    }
    assert load.budget_headers(None) == {}


def test_the_client_gives_way() -> None:
    """In a process of its own: niceness cannot be taken back."""
    told = "import os; from benchmarks.slo.priority import give_way; give_way(3); print(os.getpriority(0, 0))"
    before = os.getpriority(os.PRIO_PROCESS, 0)
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(19, before + 3)
