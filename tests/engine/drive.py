"""Drives a loaded engine by hand: requests in, steps until all have ended, pages checked after every step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.protocol import (
    AcceptedEvent,
    Event,
    FinishedEvent,
    GenerateRequest,
    PromptLogprobsEvent,
    TokenEvent,
)
from sortserve.engine.runner import Runner
from sortserve.engine.sampling import SamplingParams


@dataclass
class Outcome:
    """What one request heard."""

    tokens: list[int] = field(default_factory=list)
    submodels: list[str] = field(default_factory=list)
    accepted: AcceptedEvent | None = None
    prompt_logprobs: PromptLogprobsEvent | None = None
    finished: FinishedEvent | None = None


def load_engine(folder: Path, **settings: Any) -> Engine:
    """A small float32 engine without measured step times; `settings` are fields of EngineConfig."""
    given: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "kv_bytes": 8 << 20,
        "max_model_len": 160,
        "warmup": False,
    }
    return Engine.load(EngineConfig(model_folder=folder, **given | settings))


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def ask(request_id: str, prompt: Sequence[int], sampling: SamplingParams, **fields: Any) -> GenerateRequest:
    return GenerateRequest(request_id, tuple(prompt), sampling, time.monotonic(), **fields)


def run(
    engine: Engine, requests: Sequence[GenerateRequest], after_step: Callable[[Engine], None] | None = None
) -> list[Outcome]:
    """Run all requests together to their ends; the outcomes in their order."""
    outcomes = {request.request_id: Outcome() for request in requests}
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(5000):
        if not engine.scheduler.has_work:
            break
        for event in engine.step():
            take(outcomes[event.request_id], event)
        engine.scheduler.check_integrity()
        if after_step is not None:
            after_step(engine)
    assert not engine.scheduler.has_work, "a request hangs"
    assert all(outcome.finished is not None for outcome in outcomes.values())
    assert engine.scheduler.stats().kv_pages_used == 0, "pages are left over"
    return list(outcomes.values())


def take(outcome: Outcome, event: Event) -> None:
    assert outcome.finished is None, "an event came after the terminal one"
    if isinstance(event, TokenEvent):
        outcome.tokens.append(event.token)
        outcome.submodels.append(event.submodel)
    elif isinstance(event, AcceptedEvent):
        assert outcome.accepted is None
        outcome.accepted = event
    elif isinstance(event, PromptLogprobsEvent):
        outcome.prompt_logprobs = event
    else:
        assert isinstance(event, FinishedEvent), event
        outcome.finished = event


def last_logits(engine: Engine, prompt: Sequence[int], submodel: str = "auto") -> Tensor:
    """Logits [vocab] after the prompt."""
    assert isinstance(engine.runner, Runner)
    model = engine.runner._model
    head, seen = model.head, list[Tensor]()

    def spy(hidden: Tensor) -> Tensor:
        seen.append(head(hidden))
        return seen[-1]

    model.head = spy  # type: ignore[method-assign]
    try:
        run(engine, [ask("logits", prompt, greedy(1, ignore_eos=True), submodel=submodel)])
    finally:
        del model.head  # the class has its own
    return seen[-1][-1]
