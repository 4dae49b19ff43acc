"""From vLLM's outputs back to our events. Plain values, no vLLM, so that it is tested without it.

The scheduler sends with every output what it did for the request until then: run lengths of the sub-models of all its
output tokens. They are cumulative because vLLM merges outputs that its front end had no time to read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sortserve.engine.errors import OverloadedError
from sortserve.engine.protocol import (
    AcceptedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    PromptLogprobsEvent,
    RequestSummary,
    TokenEvent,
    TokenLogprob,
)

TOLD = "sortserve"
"""Key of what the scheduler tells in `kv_transfer_params`."""
Alternatives = Mapping[int, tuple[float, int]]
"""Log-probability and rank by token, as vLLM reports them for one position."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one message of vLLM says of a request, taken out of its classes."""

    tokens: Sequence[int]
    logprobs: Sequence[Alternatives] | None = None  # of `tokens`
    prompt_logprobs: Sequence[Alternatives | None] | None = None
    finish_reason: str | None = None  # stop, length, abort, error
    told: Mapping[str, Any] = field(default_factory=dict)  # what the scheduler sent


@dataclass(slots=True)
class Answer:
    """One request, from its submission to its terminal event."""

    asked: GenerateRequest
    full: str  # id of the full model, for what nothing else is told of
    num_output: int = 0
    accepted: bool = False
    first_token: float | None = None
    last_token: float | None = None
    made: Counter[str] = field(default_factory=Counter)
    switches: int = 0
    _last: str | None = None

    def take(self, output: Output, now: float) -> list[Event]:
        """The events of one output, in order."""
        if "refused" in output.told:
            error = OverloadedError(str(output.told["refused"]), retry_after=1.0)
            return [FailedEvent.of(self.asked.request_id, error)]
        submodels = self._submodels(output)
        events: list[Event] = []
        if not self.accepted:
            self.accepted = True
            began = submodels[0] if submodels else self._runs(output)[0]
            cached = int(output.told.get("cached", 0))
            queued = max(0.0, float(output.told.get("queue_seconds", 0.0)))
            predicted = output.told.get("predicted_seconds")
            events.append(
                AcceptedEvent(
                    self.asked.request_id, began, predicted, bool(output.told.get("predicted_met", 1)), queued, cached
                )
            )
        if output.prompt_logprobs is not None and self.asked.sampling.prompt_logprobs is not None:
            events.append(self._prompt(output.prompt_logprobs))
        wanted = self.asked.sampling.max_tokens - self.num_output
        for place, token in enumerate(output.tokens[:wanted]):
            events.append(self._token(token, submodels[place], output.logprobs, place, now))
        if output.finish_reason is not None:
            events.append(self._end(output, now))
        return events

    def _runs(self, output: Output) -> tuple[str, int]:
        runs = output.told.get("runs") or [[self.full, 0]]
        return str(runs[-1][0]), int(runs[-1][1])

    def _submodels(self, output: Output) -> list[str]:
        """Of the output's tokens, by their places in the answer."""
        runs = output.told.get("runs") or [[self.full, self.num_output + len(output.tokens)]]
        spelled = [str(name) for name, count in runs for _ in range(int(count))]
        found = spelled[self.num_output : self.num_output + len(output.tokens)]
        return found + [spelled[-1] if spelled else self.full] * (len(output.tokens) - len(found))

    def _token(
        self, token: int, submodel: str, logprobs: Sequence[Alternatives] | None, place: int, now: float
    ) -> TokenEvent:
        self.num_output += 1
        self.made[submodel] += 1
        self.switches += self._last is not None and submodel != self._last
        self._last = submodel
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now
        wanted = self.asked.sampling.logprobs
        said = None
        if logprobs is not None and wanted is not None:
            said = logprob_of(token, logprobs[place], wanted)
        return TokenEvent(self.asked.request_id, token, submodel, now, said)

    def _prompt(self, given: Sequence[Alternatives | None]) -> PromptLogprobsEvent:
        wanted = self.asked.sampling.prompt_logprobs or 0
        made = tuple(
            None if found is None else logprob_of(token, found, wanted)
            for token, found in zip(self.asked.prompt, given, strict=True)
        )
        return PromptLogprobsEvent(self.asked.request_id, made)

    def _end(self, output: Output, now: float) -> Event:
        if output.finish_reason == "error":
            return FailedEvent(self.asked.request_id, "EngineFailedError", "vLLM could not go on with this request")
        reasons: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
        return FinishedEvent(
            self.asked.request_id, reasons.get(output.finish_reason, "abort"), self.summary(output.told, now)
        )

    def summary(self, told: Mapping[str, Any], now: float) -> RequestSummary:
        """What is told at its end."""
        asked, arrival, budget = self.asked, self.asked.arrival, self.asked.budget
        met = None
        if budget is not None and asked.sampling.max_tokens == 0:
            met = budget.within_total(arrival, now)
        elif budget is not None:
            met = budget.met(arrival, self.first_token, self.last_token, self.num_output)
        return RequestSummary(
            submodels=dict(self.made),
            switches=self.switches,
            refilled_tokens=int(told.get("recomputed", 0)),
            cached_tokens=int(told.get("cached", 0)),
            preemptions=int(told.get("preemptions", 0)),
            kv_mode="exact",
            queue_seconds=told.get("queue_seconds"),
            first_token_seconds=None if self.first_token is None else self.first_token - arrival,
            total_seconds=now - arrival,
            met=met,
            cut=bool(told.get("cut", 0)),
        )


def logprob_of(token: int, found: Alternatives, wanted: int) -> TokenLogprob:
    """One position's: the token's own, and the `wanted` most probable ones, best first."""
    best = sorted(((rank, other, value) for other, (value, rank) in found.items()), key=lambda each: each[0])
    top = tuple((other, value) for rank, other, value in best if rank <= wanted)
    return TokenLogprob(token, found[token][0], top)
