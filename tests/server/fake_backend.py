"""A back end that answers known tokens at a known pace and fails on demand, and a tokenizer with one token per byte."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import tokenizers
import uvicorn
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers

from sortserve.engine.ladder import Entry, Ladder, Measured, Quality
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
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.text import Tokenizer
from sortserve.server.app import create_app
from sortserve.server.bounded_http import BoundedHttpProtocol
from sortserve.server.state import ServerOptions, ServerState

SHAPE = ModelShape(4, 64, 128, 4, 2, 16, 258)
MAX_MODEL_LEN = 128
BOS, EOS = 256, 257
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_tokenizer(template: str | None = TEMPLATE, merged: Sequence[str] = ()) -> Tokenizer:
    """Token b is byte b; 256 and 257 are special; `merged` are further tokens, in byte-level spelling."""
    alphabet = byte_alphabet()
    vocab = {char: byte for byte, char in enumerate(alphabet)}
    hf = tokenizers.Tokenizer(models.BPE(vocab, [], fuse_unk=False))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens(["<bos>", "<eos>"])
    hf.add_tokens(list(merged))
    return Tokenizer(hf, {"bos_token": "<bos>", "eos_token": "<eos>"}, template)


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte, worked out here a second time as a check on the one in text.py."""
    shifted = 0
    alphabet = []
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(256 + shifted))
            shifted += 1
    return alphabet


def ladder() -> Ladder:
    """d2 (0.8), d4-w50 (0.9), d4."""
    entries = [
        Entry("d2", SubModel.make(2, 128), Quality(0.8, 0.75, 0.85)),
        Entry("d4-w50", SubModel.make(4, 64), Quality(0.9)),
        Entry("d4", SubModel.make(4, 128), Quality(1.0)),
    ]
    return Ladder.of(SHAPE, entries, Measured("agreement", "made up"))


@dataclass
class FakeBackend:
    """Answers `answer`, then stops. `requests` and `aborted` tell what it was asked and what was left early."""

    answer: Sequence[int] = tuple(b"hello world")
    submodels: Sequence[str] = ("d4",)  # of the tokens in turn, for `auto`
    delay: float = 0.0  # seconds before each token
    predicted: float | None = 0.25
    predicted_met: bool = True
    refuse: FailedEvent | None = None
    fail_after: int | None = None  # tokens, then a FailedEvent
    raise_after: int | None = None  # tokens, then an exception: a bug in the back end
    vanish_after: int | None = None  # tokens, then the end without a terminal event
    load_error: BaseException | None = None
    may_load: asyncio.Event | None = None  # start() waits for it
    alive: bool = True
    ready: bool = True
    restarts: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: int = 0
    drained: list[float] = field(default_factory=list)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            "fake", ladder(), MAX_MODEL_LEN, 258, (EOS,), frozenset({"reuse", "refill"}), block_tokens=16, kv_blocks=4
        )
    )

    async def start(self) -> None:
        if self.may_load is not None:
            await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error

    def expect(self) -> None:
        """Nothing has to be woken."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        if self.refuse is not None:
            yield FailedEvent(request.request_id, self.refuse.error, self.refuse.message, self.refuse.param)
            return
        self.running += 1
        finished = False
        try:
            async for event in self._events(request):
                finished = isinstance(event, FinishedEvent | FailedEvent)
                yield event
        finally:
            self.running -= 1
            if not finished:
                self.aborted.append(request.request_id)

    async def _events(self, request: GenerateRequest) -> AsyncIterator[Event]:
        first = self.submodels[0] if request.submodel == "auto" else request.submodel
        predicted = self.predicted if request.budget is not None else None
        yield AcceptedEvent(request.request_id, first, predicted, self.predicted_met, 0.001, 2)
        wanted = request.sampling.prompt_logprobs
        if wanted is not None:
            yield PromptLogprobsEvent(
                request.request_id, (None, *(logprob_of(token, wanted) for token in request.prompt[1:]))
            )
        limit = request.sampling.max_tokens
        for number, token in enumerate(self.answer[:limit]):
            await asyncio.sleep(self.delay)
            if number == self.fail_after:
                yield FailedEvent(request.request_id, "EngineFailedError", "the engine died")
                return
            if number == self.raise_after:
                raise RuntimeError("secret detail")
            if number == self.vanish_after:
                return
            submodel = self.submodels[number % len(self.submodels)] if request.submodel == "auto" else request.submodel
            logprob = None if request.sampling.logprobs is None else logprob_of(token, request.sampling.logprobs)
            yield TokenEvent(request.request_id, token, submodel, time.monotonic(), logprob, refilled_tokens=3)
        reason = "length" if limit <= len(self.answer) else "stop"
        summary = RequestSummary(refilled_tokens=3, cached_tokens=2, queue_seconds=0.001, kv_mode="reuse")
        yield FinishedEvent(request.request_id, "length" if reason == "length" else "stop", summary)

    async def stats(self) -> EngineStats:
        return EngineStats(
            running=self.running,
            waiting=1,
            kv_pages_total=8,
            kv_pages_used=2,
            generated_tokens={"d4": 5},
            selected={("d4", "no-budget"): 2},
            switches={"down": 1},
            dropped={"queue-full": 1},
        )

    async def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        return {"d2": Prediction(0.01, 0.002), "d4": Prediction(0.02, 0.004)}

    async def drain(self, timeout: float) -> None:
        self.drained.append(timeout)
        while self.running:
            await asyncio.sleep(0.01)


def logprob_of(token: int, num_top: int) -> TokenLogprob:
    """The token itself is the second best; the best is the next byte."""
    top = (((token + 1) % 256, -0.5), (token, -1.0), ((token + 2) % 256, float("-inf")))
    return TokenLogprob(token, -1.0, top[:num_top])


@contextlib.asynccontextmanager
async def open_client(
    backend: FakeBackend, options: ServerOptions | None = None, loaded: bool = True, template: str | None = TEMPLATE
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app over `backend`, without a socket between them; `loaded`: wait until it is ready."""
    app = create_app(backend, byte_tokenizer(template), options)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        while loaded and app.state.server.phase == "loading":
            await asyncio.sleep(0)
        yield client


def state_of(client: httpx.AsyncClient) -> ServerState:
    """The state behind a client of `open_client`."""
    transport = client._transport
    assert isinstance(transport, httpx.ASGITransport)
    app = transport.app
    assert isinstance(app, FastAPI)
    state = app.state.server
    assert isinstance(state, ServerState)
    return state


class _ThreadServer(uvicorn.Server):
    def handle_exit(self, sig: int, frame: object) -> None:
        """Signals belong to pytest."""


@contextlib.contextmanager
def served(app: FastAPI, http: type[BoundedHttpProtocol] = BoundedHttpProtocol) -> Iterator[str]:
    """The app under a real uvicorn in a thread, on a free port; yields its base URL."""
    config = uvicorn.Config(
        app, port=0, http=http, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=2
    )
    server = _ThreadServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not (server.started and app.state.server.phase != "loading"):
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
