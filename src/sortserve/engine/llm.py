"""Offline use: prompts in, completions out, in the calling thread."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sortserve.engine.budget import Budget
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.protocol import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    KVMode,
    RequestSummary,
    TokenEvent,
)
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import Tokenizer
from sortserve.engine.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt. `submodels[i]` is the id of the sub-model that made `token_ids[i]`."""

    text: str
    token_ids: tuple[int, ...]
    submodels: tuple[str, ...]
    finish_reason: str
    summary: RequestSummary


class LLM:
    """A loaded model. Further keywords are fields of `EngineConfig`. Raises StartupError."""

    def __init__(self, model: str | Path, **settings: object) -> None:
        folder = Path(model)
        self.engine = Engine.load(EngineConfig(model_folder=folder, **settings))  # type: ignore[arg-type]
        self.tokenizer = Tokenizer.load(folder)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        budget: Budget | None = None,
        submodel: str = "auto",
        floor: str | None = None,
        kv_mode: KVMode | None = None,
    ) -> list[Completion]:
        """One completion per prompt (text or token ids), all run together; in the prompts' order.

        Raises RequestError if one of the prompts cannot be served, or a grammar turns out to cost too much, and
        OverloadedError if a strict budget cannot be kept beside the others; then none is.
        """
        params = sampling or SamplingParams(max_tokens=64, temperature=0.0)
        arrival = time.monotonic()
        open_answers: dict[str, _Answer] = {}
        scheduler = self.engine.scheduler
        try:
            for prompt in prompts:
                tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                request_id = f"llm-{next(self._ids)}"
                scheduler.add(
                    GenerateRequest(request_id, tuple(tokens), params, arrival, budget, submodel, floor, None, kv_mode)
                )
                open_answers[request_id] = _Answer(self.tokenizer, params.stop, tokens)
            while any(answer.finished is None for answer in open_answers.values()):
                for event in self.engine.step():
                    self._take(event, open_answers)
        finally:
            for request_id in open_answers:
                scheduler.abort(request_id, time.monotonic())
        return [answer.completion() for answer in open_answers.values()]

    def _take(self, event: Event, open_answers: dict[str, "_Answer"]) -> None:
        answer = open_answers[event.request_id]
        if isinstance(event, TokenEvent):
            if answer.finished is None and answer.add(event):
                ended = self.engine.scheduler.abort(event.request_id, time.monotonic())
                if ended is not None:
                    answer.end(ended, "stop")
        elif isinstance(event, FinishedEvent) and answer.finished is None:
            answer.end(event, event.reason)
        elif isinstance(event, FailedEvent):
            raise event.as_error()


class _Answer:
    """What has come of one answer so far."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int]) -> None:
        self._stream = TextStream(tokenizer, stop, prompt)
        self._text = ""
        self._tokens: list[int] = []
        self._submodels: list[str] = []
        self._reason = ""
        self.finished: FinishedEvent | None = None

    def add(self, event: TokenEvent) -> bool:
        """Take a token; True if a stop string is complete."""
        self._text += self._stream.push(event.token)
        self._tokens.append(event.token)
        self._submodels.append(event.submodel)
        return self._stream.stopped is not None

    def end(self, event: FinishedEvent, reason: str) -> None:
        self._text += self._stream.finish()
        self._reason = "stop" if self._stream.stopped is not None else reason
        self.finished = event

    def completion(self) -> Completion:
        assert self.finished is not None
        return Completion(self._text, tuple(self._tokens), tuple(self._submodels), self._reason, self.finished.summary)
