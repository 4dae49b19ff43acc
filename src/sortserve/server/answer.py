"""What is known of the answers while their events come: text and log-probabilities that may leave, and what to tell.

All but `cut` is known from the tokens themselves, because an answer that ends at a stop string is aborted, and then the
engine sends no summary.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.engine.budget import Budget
from sortserve.engine.protocol import (
    AcceptedEvent,
    FinishedEvent,
    PromptLogprobsEvent,
    RequestSummary,
    TokenEvent,
    TokenLogprob,
)
from sortserve.engine.text import Tokenizer
from sortserve.engine.text_stream import TextStream
from sortserve.server.prepare import Job
from sortserve.server.tool_calls import ToolCall, ToolCallParser


@dataclass(frozen=True, slots=True)
class Entry:
    """Log-probabilities of one token, `start` characters into the text that the client gets."""

    token: int
    start: int
    logprob: TokenLogprob | None  # None for the first token of a prompt


@dataclass(frozen=True, slots=True)
class Delta:
    """What may leave now."""

    text: str = ""
    entries: tuple[Entry, ...] = ()
    calls: tuple[ToolCall, ...] = ()

    @property
    def empty(self) -> bool:
        """True where there is nothing to send."""
        return not self.text and not self.entries and not self.calls


class Answer:
    """One answer of a job, built from its events. `finish_reason` is None until it is complete."""

    def __init__(self, job: Job, place: int, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._prompt = job.prompt_of(place)
        self._stream = TextStream(tokenizer, job.sampling.stop, self._prompt.tokens)
        self._parser = None if job.tools is None else ToolCallParser(job.tools.names, parallel=job.tools.parallel)
        self._pending: deque[Entry] = deque()  # their text has not left, and may still turn out to be a stop string
        self._echo_chars = 0
        self.accepted: AcceptedEvent | None = None
        self.submodel: str | None = None  # of the last token
        self.finish_reason: str | None = None
        self.summary: RequestSummary | None = None
        self.submodels: Counter[str] = Counter()
        self.switches = 0
        self.refilled_tokens = 0
        self.first_time: float | None = None
        self.last_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens so far, those of a stop string included."""
        return self.submodels.total()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had."""
        return 0 if self.accepted is None else self.accepted.cached_tokens

    def open(self) -> Delta:
        """What leaves before the first token: the echo, unless it has to wait for its log-probabilities."""
        return self._echo() if self._job.echo and self._job.sampling.prompt_logprobs is None else Delta()

    def prompt(self, event: PromptLogprobsEvent) -> Delta:
        """The echo with its log-probabilities."""
        delta, start, entries = self._echo(), 0, []
        if not self._job.tell_logprobs:
            return delta
        for token, logprob in zip(self._prompt.tokens, event.logprobs, strict=True):
            entries.append(Entry(token, start, logprob))
            piece = self._tokenizer.token_bytes(token).decode("utf-8", "ignore")
            # a special token is in the text only where the client wrote it there itself
            if token not in self._tokenizer.special_ids or delta.text.startswith(piece, start):
                start += len(piece)
        return Delta(delta.text, tuple(entries))

    def token(self, event: TokenEvent, now: float) -> Delta:
        """One more token, on its way to the client at `now`. Sets `finish_reason` if it completes a stop string, or the
        only call that is wanted."""
        self.submodels[event.submodel] += 1
        self.switches += self.submodel not in (None, event.submodel)
        self.submodel = event.submodel
        self.refilled_tokens = event.refilled_tokens
        self.first_time = now if self.first_time is None else self.first_time
        self.last_time = now
        if self._job.tell_logprobs:
            self._pending.append(Entry(event.token, self._echo_chars + self._stream.decoded_chars, event.logprob))
        text = self._stream.push(event.token)
        if self._stream.stopped is not None:
            self.finish_reason = "stop"
        entries = self._release()
        return Delta(text, entries) if self._parser is None else self._split(self._parser, text, entries)

    def finish(self, event: FinishedEvent) -> Delta:
        """The end as the engine tells it: what was held back leaves."""
        self.summary = event.summary
        self.refilled_tokens = event.summary.refilled_tokens
        self.finish_reason = event.reason
        text = self._stream.finish()
        entries = tuple(self._pending)
        self._pending.clear()
        return Delta(text, entries) if self._parser is None else self._split(self._parser, text, entries)

    def _split(self, parser: ToolCallParser, text: str, entries: tuple[Entry, ...]) -> Delta:
        """Text and calls apart. An answer with calls that came to its end ended for their sake."""
        said, calls = parser.push(text)
        if self.finish_reason is not None:
            said += parser.finish()
        elif parser.complete:
            self.finish_reason = "stop"
        if parser.num_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return Delta(said, entries, calls)

    def met(self, budget: Budget, arrival: float, last_time: float) -> bool:
        """Whether the budget was kept, the last token being written at `last_time`."""
        if self._job.sampling.max_tokens == 0:
            return budget.within_total(arrival, last_time)
        return budget.met(arrival, self.first_time, last_time, self.num_tokens)

    def _echo(self) -> Delta:
        prompt = self._prompt
        text = self._tokenizer.decode(prompt.tokens, skip_special_tokens=False) if prompt.text is None else prompt.text
        self._echo_chars = len(text)
        return Delta(text)

    def _release(self) -> tuple[Entry, ...]:
        """Entries whose text has begun to leave."""
        left = self._echo_chars + self._stream.emitted_chars
        entries = []
        while self._pending and self._pending[0].start < left:
            entries.append(self._pending.popleft())
        return tuple(entries)


def usage(job: Job, answers: Sequence[Answer]) -> dict[str, Any]:
    """The `usage` object as of now."""
    completion = sum(answer.num_tokens for answer in answers)
    # several answers to one prompt count it once: the first may have computed what the others found
    by_prompt = [answers[first : first + job.num_choices] for first in range(0, len(answers), job.num_choices)]
    cached = sum(min(answer.cached_tokens for answer in group) for group in by_prompt)
    return {
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": job.num_prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def tell(job: Job, answers: Sequence[Answer], now: float) -> dict[str, Any]:
    """The `sortserve` object."""
    summaries = [answer.summary for answer in answers if answer.summary is not None]
    budget = job.terms.budget
    return {
        "submodels": tokens_by_submodel(answers),
        "switches": sum(answer.switches for answer in answers),
        "refilled_tokens": sum(answer.refilled_tokens for answer in answers),
        "budget_ms": None if budget is None else budget.total_ms,
        "elapsed_ms": round((now - job.arrival) * 1e3, 3),
        "ttft_ms": _milliseconds(first_token_seconds(job, answers)),
        "tpot_ms": _milliseconds(per_token_seconds(answers)),
        "met": all_met(job, answers, now),
        "kv": job.terms.effective_kv_mode,
        "cut": any(summary.cut for summary in summaries),
    }


def tokens_by_submodel(answers: Sequence[Answer]) -> dict[str, int]:
    """Output tokens of all answers, by the id of what made them."""
    submodels: Counter[str] = Counter()
    for answer in answers:
        submodels.update(answer.submodels)
    return dict(submodels)


def all_met(job: Job, answers: Sequence[Answer], now: float) -> bool | None:
    """Whether every answer kept the budget; None without one. A body that is not streamed leaves as a whole at `now`,
    so that is when its last token is written; a first token counts from when it was there."""
    budget = job.terms.budget
    if budget is None:
        return None
    return all(
        answer.met(budget, job.arrival, now if not job.stream or answer.last_time is None else answer.last_time)
        for answer in answers
    )


def first_token_seconds(job: Job, answers: Sequence[Answer]) -> float | None:
    """Arrival to the first token of any answer; None if there was none."""
    times = [answer.first_time for answer in answers if answer.first_time is not None]
    return min(times) - job.arrival if times else None


def per_token_seconds(answers: Sequence[Answer]) -> float | None:
    """Mean time per output token after the first, over answers of two tokens and more."""
    means = [
        (answer.last_time - answer.first_time) / (answer.num_tokens - 1)
        for answer in answers
        if answer.first_time is not None and answer.last_time is not None and answer.num_tokens > 1
    ]
    return sum(means) / len(means) if means else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
