"""The engine in its own process: what crosses, what is heard when it dies, hangs or cannot be loaded, and who follows."""

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from sortserve.engine import messages, supervisor
from sortserve.engine.budget import Budget
from sortserve.engine.config import EngineConfig
from sortserve.engine.connection import EngineConnection
from sortserve.engine.errors import DrainingError, EngineFailedError, ModelFolderError, StartupError
from sortserve.engine.ladder import Entry, Figures, Ladder, Measured, Pair, Quality, Score
from sortserve.engine.ladder_file import Estimate
from sortserve.engine.protocol import (
    AcceptedEvent,
    EngineInfo,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    Prediction,
    PromptLogprobsEvent,
    RequestSummary,
    TokenEvent,
    TokenLogprob,
)
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.supervisor import ProcessBackend
from tests.engine.drive import Outcome, ask, greedy, load_engine, run, take
from tests.engine.test_engine import drawn, tokens
from tests.engine.tiny_models import make_tiny

PAGE_BYTES = 2 * 6 * 16 * 2 * 8 * 4  # K and V, layers, tokens, key/value heads, head_dim, float32
PLANTED = (sys.executable, "-P", str(Path(__file__).parent / "planted_engine.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without a ladder: full depth at two widths, so that a page has all six layers."""
    made = tmp_path_factory.mktemp("tiny")
    make_tiny(made, "llama", seed=11)
    return made


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which faults are planted."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    made = tmp_path / "control"
    made.mkdir()
    return made


@asynccontextmanager
async def started(
    folder: Path, control: Path, *, hang_seconds: float = 60.0, **settings: Any
) -> AsyncIterator[ProcessBackend]:
    """A loaded back end; at the end drained, its pages counted by the engine itself (exit code 1 if they are wrong)."""
    given: dict[str, Any] = {"dtype": "float32", "kv_bytes": 8 << 20, "max_model_len": 160, "warmup": False}
    config = EngineConfig(folder, **given | settings)
    backend = ProcessBackend(config, hang_seconds=hang_seconds, command=(*PLANTED, str(control)))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.drain(5.0)
        assert not backend.ready


def stream(backend: ProcessBackend, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    return cast("AsyncGenerator[Event, None]", backend.generate(request))


async def heard(backend: ProcessBackend, request: GenerateRequest) -> tuple[Outcome, FailedEvent | None]:
    """Everything a request hears; FailedEvent if that is how it ended."""
    outcome, failed = Outcome(), None
    async for event in backend.generate(request):
        assert failed is None, "an event came after the terminal one"
        assert outcome.finished is None, "an event came after the terminal one"
        if isinstance(event, FailedEvent):
            failed = event
        else:
            take(outcome, event)
    return outcome, failed


async def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for an async or plain condition."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if await value if asyncio.iscoroutine(value) else value:
            return
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.01)


async def is_running(backend: ProcessBackend) -> bool:
    return (await backend.stats()).running > 0


# ---- what crosses


def crossing() -> list[messages.Command | messages.Report]:
    """One of everything, with every field set."""
    shape = ModelShape(4, 64, 128, 4, 2, 16, 258)
    figures = {"books": Figures(Estimate(2.5, 2.0, 3.0), Estimate(0.5, 0.4, 0.6), Estimate(0.1, 0.0, 0.2), 7)}
    scores = {"gsm8k": Score(0.5, 0.4, 0.6, 10)}
    narrow = Entry("d2", SubModel.make(2, 128, [1]), Quality(0.5, 0.4, 0.6), True, figures, scores, 1.5, "evopress")
    measured = Measured(
        "agreement", "text", "command", 7, "loss", {"books": "00"}, {"torch": "2"}, "cpu", "2026-11-26", 3.5
    )
    pairs = [Pair("d2", "d4", figures)]
    ladder = Ladder.of(shape, [narrow, Entry("d4", SubModel.full(shape))], measured, pairs)
    assert ladder.costs  # cached values lie beside the fields, and must not disturb
    sampling = SamplingParams(5, 0.5, logit_bias={3: 1.5}, seed=-4, stop=("a", "b"), stop_token_ids=(1,), logprobs=2)
    budget = Budget(100.0, 50.0, 5.0, "cut")
    request = GenerateRequest("r", (1, 2, 3), sampling, 12.5, budget, "auto", "d2", 0.5, "exact")
    logprob = TokenLogprob(3, -1.5, ((3, -1.5), (4, float("-inf"))))
    events: list[Event] = [
        AcceptedEvent("r", "d2", 0.5, False, 0.25, 16),
        PromptLogprobsEvent("r", (None, logprob)),
        TokenEvent("r", 3, "d2", 13.5, logprob, 7),
        FinishedEvent("r", "stop", RequestSummary({"d2": 3}, 1, 2, 3, 4, "reuse", 0.1, 0.2, 0.3, True, True)),
        FailedEvent("r", "OverloadedError", "full", "prompt", 2.5),
    ]
    stats = EngineStats(1, 2, 3, generated_tokens={"d2": 4}, selected={("d2", "budget"): 5}, dropped={"x": 6})
    return [
        messages.Load(EngineConfig(Path("model"), ladder_path=Path("ladder.json"), kv_bytes=2**40), 20),
        messages.Submit(request),
        messages.Abort("r"),
        messages.Expect(),
        messages.Ask(3, "predictions", 100),
        messages.Stop(),
        messages.Loading(1, 4),
        messages.Loaded(EngineInfo("m", ladder, 128, 258, (257,), frozenset({"refill"}), 2**33, 3, 1.5)),
        messages.NotLoaded("LadderError", "bad", "ladder"),
        messages.Happened(events),
        messages.Answer(1, stats=stats),
        messages.Answer(2, predictions={"d2": Prediction(0.5, 0.25)}),
        messages.Stopped(),
    ]


@pytest.mark.parametrize("message", crossing(), ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_were_sent(message: messages.Command | messages.Report) -> None:
    decode = messages.decode_command if isinstance(message, messages.Command) else messages.decode_report
    assert decode(messages.encode(message)) == message


# ---- one engine


async def test_it_streams_what_the_engine_makes(folder: Path, control: Path) -> None:
    request = ask("one", tokens(1, 20), greedy(15))
    expected = run(load_engine(folder), [request])[0].tokens
    async with started(folder, control) as backend:
        kinds: list[type[Event]] = []
        got = []
        for _ in range(2):  # a request that is read and never submitted holds nothing up
            backend.expect()
        async for event in backend.generate(request):
            kinds.append(type(event))
            if isinstance(event, TokenEvent):
                got.append(event.token)
        assert kinds == [AcceptedEvent, *[TokenEvent] * 15, FinishedEvent]
        assert got == expected
        assert (await backend.stats()).generated_tokens == {"d6": 15}
        assert await backend.predict(10) == {}, "no warm-up, no predictions"
        for request, error, words in (
            (ask("long", tokens(1, 150), greedy(11)), "ContextLengthError", "161"),
            (ask("unknown", tokens(1, 5), greedy(1), submodel="d9"), "NotFoundError", "d9"),
        ):
            _, failed = await heard(backend, request)
            assert failed is not None
            assert failed.error == error
            assert words in failed.message
        outcome, failed = await heard(backend, ask("fine", tokens(1, 5), greedy(3)))
        assert failed is None
        assert len(outcome.tokens) == 3


async def test_who_is_accepted_hears_it_before_the_step_ends(folder: Path, control: Path) -> None:
    """The response's headers leave while the first step runs, not after it."""
    async with started(folder, control) as backend:
        (control / "hang").touch()
        async with aclosing(stream(backend, ask("one", tokens(1, 20), greedy(3)))) as events:
            assert isinstance(await asyncio.wait_for(anext(events), 60), AcceptedEvent)
            (control / "hang").unlink()
            assert [type(event) async for event in events] == [*[TokenEvent] * 3, FinishedEvent]


async def test_leaving_early_frees_the_pages(folder: Path, control: Path) -> None:
    """Within one step: the next answer to a question is after it."""
    async with started(folder, control, prefix_cache=False) as backend:
        (control / "slow").touch()  # else the answers may have ended before anybody leaves
        async with aclosing(stream(backend, ask("left", tokens(1, 40), greedy(100)))) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    break
            assert (await backend.stats()).kv_pages_used > 0
        stats = await backend.stats()
        assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
        assert (await backend.stats()).steps == stats.steps < 100

        task = asyncio.create_task(heard(backend, ask("cancelled", tokens(1, 40), greedy(100))))
        await until(lambda: is_running(backend))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await backend.stats()).kv_pages_used == 0


async def test_thirty_at_once(folder: Path, control: Path) -> None:
    """More than fit in memory or in a step, every third one leaving early; every other one gets its own answer."""
    rng = random.Random(7)
    requests = [ask(str(n), tokens(n, rng.randrange(1, 60)), drawn(n, rng.randrange(5, 40))) for n in range(30)]
    reference = load_engine(folder, prefix_cache=False)
    expected = [run(reference, [request])[0].tokens for request in requests]

    async def leave(backend: ProcessBackend, request: GenerateRequest) -> None:
        async with aclosing(stream(backend, request)) as events:
            count = 0
            async for _ in events:
                count += 1
                if count == 3:
                    return

    settings: dict[str, Any] = {"kv_bytes": 30 * PAGE_BYTES, "max_step_tokens": 40, "max_running": 7}
    async with started(folder, control, **settings, max_model_len=100) as backend:
        work = [leave(backend, r) if n % 3 == 2 else heard(backend, r) for n, r in enumerate(requests)]
        ends = await asyncio.wait_for(asyncio.gather(*work), 60)
        for number, end in enumerate(ends):
            if end is not None:
                outcome, failed = end
                assert failed is None
                assert outcome.tokens == expected[number]
        stats = await backend.stats()
        assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)


# ---- draining


async def test_drain(folder: Path, control: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What runs is finished, what comes is refused, and then the process is gone, its pages counted."""
    async with started(folder, control) as backend:
        (control / "slow").touch()  # else it may have ended before anybody sees it run
        short = asyncio.create_task(heard(backend, ask("short", tokens(1, 20), greedy(30))))
        await until(lambda: is_running(backend))
        pid = backend.pid
        assert pid is not None
        drained = asyncio.create_task(backend.drain(30.0))
        await asyncio.sleep(0)
        _, refused = await heard(backend, ask("late", tokens(1, 5), greedy(1)))
        assert refused is not None
        assert refused.error == "DrainingError"
        outcome, failed = await short
        assert failed is None
        assert len(outcome.tokens) == 30
        await drained
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(EngineFailedError):  # and not a question that nobody answers
            await asyncio.wait_for(backend.stats(), 60)
        assert backend.restarts == 0
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_drain_aborts_after_its_time(folder: Path, control: Path) -> None:
    async with started(folder, control) as backend:
        (control / "slow").touch()
        task = asyncio.create_task(heard(backend, ask("slow", tokens(1, 20), greedy(130))))
        await until(lambda: is_running(backend))
        await backend.drain(0.1)
        outcome, failed = await asyncio.wait_for(task, 60)
        assert failed is None
        assert outcome.finished is not None
        assert outcome.finished.reason == "abort"
        assert len(outcome.tokens) < 130


async def test_drained_while_loading(folder: Path, control: Path) -> None:
    """The process that loads is ended, and whoever waits for it is told."""
    backend = ProcessBackend(EngineConfig(folder, kv_bytes=8 << 20), command=(*PLANTED, str(control)))
    starting = asyncio.create_task(backend.start())
    await asyncio.sleep(0.2)
    await asyncio.wait_for(backend.drain(30.0), 60)
    with pytest.raises(DrainingError):
        await starting


# ---- death, hanging, and what follows


async def test_a_death_reaches_everyone_once(folder: Path, control: Path) -> None:
    """Streams that run, one that waits and a question under way hear it; then the next engine serves as the first."""
    request = ask("again", tokens(1, 20), greedy(15))
    expected = run(load_engine(folder), [request])[0].tokens
    async with started(folder, control, max_running=3) as backend:
        (control / "slow").touch()
        tasks = [
            asyncio.create_task(heard(backend, ask(str(number), tokens(number, 10), greedy(140))))
            for number in range(5)
        ]
        await until(lambda: is_running(backend))
        first = backend.pid
        (control / "crash").touch()
        questions = [asyncio.create_task(backend.predict(3)) for _ in range(3)]
        ends = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        for outcome, failed in ends:
            assert outcome.finished is None
            assert failed is not None
            assert failed.error == "EngineFailedError"
            assert "planted" not in failed.message, "what is inside stays inside"
        answers = await asyncio.wait_for(asyncio.gather(*questions, return_exceptions=True), 60)
        assert all(answer == {} or isinstance(answer, EngineFailedError) for answer in answers)
        assert (backend.alive, backend.ready) == (True, False)
        _, failed = await asyncio.wait_for(heard(backend, ask("later", tokens(1, 3), greedy(1))), 60)
        assert failed is not None
        assert (failed.error, failed.retry_after) == ("EngineFailedError", 1.0)
        with pytest.raises(EngineFailedError, match="restarted"):
            await backend.stats()

        for name in ("slow", "crash"):
            (control / name).unlink()
        await until(lambda: backend.ready)
        outcome, failed = await heard(backend, request)
        assert (outcome.tokens, failed) == (expected, None)
        assert backend.restarts == 1
        assert backend.pid != first
        assert (await backend.stats()).generated_tokens == {"d6": 15}, "counters begin again"


async def test_the_next_engine_has_the_same_sizes(folder: Path, control: Path) -> None:
    """They followed from the memory that was free at its start, so requests that had been served were refused."""
    async with started(folder, control, kv_bytes=None, max_model_len=None) as backend:
        before = backend.info
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        await until(lambda: not backend.ready)
        assert (backend._config.kv_bytes, backend._config.max_model_len) == (before.kv_bytes, before.max_model_len)
        await until(lambda: backend.ready)
        assert (backend.info.kv_bytes, backend.info.max_model_len) == (before.kv_bytes, before.max_model_len)


@pytest.mark.parametrize("how", ["hang", "stop"])
async def test_an_engine_that_hangs_is_replaced(folder: Path, control: Path, how: str) -> None:
    """In a step that never ends, or stopped by a signal."""
    async with started(folder, control, hang_seconds=1.0) as backend:
        pid = backend.pid
        assert pid is not None
        (control / "slow").touch()
        task = asyncio.create_task(heard(backend, ask("stuck", tokens(1, 10), greedy(140))))
        await until(lambda: is_running(backend))
        if how == "hang":
            (control / "hang").touch()
        else:
            os.kill(pid, signal.SIGSTOP)
        _, failed = await asyncio.wait_for(task, 60)
        assert failed is not None
        assert "no step ended for 1 s" in failed.message
        (control / "hang").unlink(missing_ok=True)
        await until(lambda: backend.ready)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert (await heard(backend, ask("next", tokens(1, 5), greedy(3))))[1] is None


async def test_a_slow_engine_is_not_taken_for_a_hung_one(folder: Path, control: Path) -> None:
    """Many steps, all together longer than a step may take."""
    async with started(folder, control, hang_seconds=2.0) as backend:
        (control / "slow").touch()
        outcome, failed = await heard(backend, ask("slow", tokens(1, 10), greedy(140)))
        assert failed is None
        assert len(outcome.tokens) == 140
        assert backend.restarts == 0


async def test_a_folder_that_cannot_be_loaded(folder: Path, control: Path, tmp_path: Path) -> None:
    """The engine's own error, by class; and no further try."""
    backend = ProcessBackend(EngineConfig(tmp_path), command=(*PLANTED, str(control)))
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        await backend.start()
    await backend.drain(1.0)
    (control / "unloadable").touch()
    backend = ProcessBackend(EngineConfig(folder), command=(*PLANTED, str(control)))
    with pytest.raises(StartupError, match="planted") as refused:
        await backend.start()
    assert refused.value.param == "model_folder"
    backend = ProcessBackend(EngineConfig(folder), command=(sys.executable, "-c", "import sys; sys.exit(3)"))
    with pytest.raises(EngineFailedError, match="exit code 3"):
        await backend.start()
    assert backend.alive is True


@pytest.mark.parametrize("name", ["nowhere/at/all", "long" * 30])
async def test_no_place_for_the_socket(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It waited for ever, and said nothing."""
    if name.startswith("long"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    backend = ProcessBackend(EngineConfig(folder))
    with pytest.raises(StartupError, match="TMPDIR"):
        await asyncio.wait_for(backend.start(), 60)
    assert not backend.alive


async def test_a_process_that_cannot_be_started_again(
    folder: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of memory or files, say: tried again, where it was given up at once."""
    spawn, failures = EngineConnection.spawn, [OSError("planted"), zmq.ZMQError(24)]

    async def fails_twice(*args: Any) -> EngineConnection:
        if failures:
            raise failures.pop()
        return await spawn(*args)

    async with started(folder, control) as backend:
        assert backend.pid is not None
        monkeypatch.setattr(EngineConnection, "spawn", fails_twice)
        os.kill(backend.pid, signal.SIGKILL)
        await until(lambda: not backend.ready)
        await until(lambda: backend.ready)
        assert backend.restarts == 3
        assert (await heard(backend, ask("next", tokens(1, 5), greedy(3))))[1] is None


async def test_the_users_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for the engine's libraries is a default; it replaced what a user had tuned."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    told = tmp_path / "told"
    code = f"import os; open({str(told)!r}, 'w').write(os.environ['GOMP_SPINCOUNT'] + os.environ['LRU_CACHE_CAPACITY'])"
    with zmq.Context() as context:
        engine = await EngineConnection.spawn(context, f"ipc://{tmp_path}/e", None, (sys.executable, "-c", code))
        await engine._process.wait()
        await engine.kill("the test is over")
    assert told.read_text() == "7128"


async def test_an_engine_that_never_comes_back(folder: Path, control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some tries it is given up, which `alive` tells."""
    monkeypatch.setattr(supervisor, "_PAUSES", (0.0,))
    monkeypatch.setattr(supervisor, "_MOST_FAILED_LOADS", 2)
    async with started(folder, control) as backend:
        assert backend.pid is not None
        (control / "unloadable").touch()
        os.kill(backend.pid, signal.SIGKILL)
        await until(lambda: not backend.alive)
        assert not backend.ready
        assert backend.restarts == 2
        _, failed = await heard(backend, ask("late", tokens(1, 5), greedy(1)))
        assert failed is not None
        assert "not coming back" in failed.message


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go meanwhile. pytest's own folders have paths too long for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


async def test_nothing_is_left_behind(folder: Path, control: Path, temporary: Path) -> None:
    """Neither processes nor sockets, when the back end is drained after two deaths."""
    pids = []
    async with started(folder, control) as backend:
        for _ in range(2):
            assert backend.pid is not None
            pids.append(backend.pid)
            os.kill(backend.pid, signal.SIGKILL)
            await until(lambda: not backend.ready)
            await until(lambda: backend.ready)
        assert backend.pid is not None
        pids.append(backend.pid)
        [directory] = temporary.iterdir()
        assert [path.name for path in directory.iterdir()] == ["engine-2"]
        assert directory.stat().st_mode & 0o077 == 0, "nobody else reaches the socket"
    assert list(temporary.iterdir()) == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_it_ends_with_the_process_that_started_it(folder: Path, control: Path, tmp_path: Path) -> None:
    """Killed without a word: the engine notices, and takes the socket with it."""
    code = f"""
import asyncio
from pathlib import Path
from sortserve.engine.config import EngineConfig
from sortserve.engine.supervisor import ProcessBackend

async def main():
    backend = ProcessBackend(EngineConfig(Path({str(folder)!r}), dtype="float32", kv_bytes=8 << 20, warmup=False))
    await backend.start()
    print(backend.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=env)
    assert owner.stdout is not None
    pid = int(await asyncio.wait_for(owner.stdout.readline(), 60))
    os.kill(pid, 0)
    owner.kill()
    await owner.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    await until(gone)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("sortserve-")] == []
