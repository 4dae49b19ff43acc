"""From vLLM's outputs back to our events. Plain values, no vLLM, so that it is tested without it.

The scheduler sends with every output what it did for the request until then (`sched.py`): run lengths of the sub-models of
all its output tokens. They are cumulative because vLLM merges outputs that its front end had no time to read.
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
    KVMode,
    PromptLogprobsEvent,
    RequestSummary,
    TokenEvent,
    TokenLogprob,
)

TOLD = "sortserve"
"""Key of what the scheduler tells in `kv_transfer_params`."""
RETRY_SECONDS = 1.0
"""What a refused client is asked to wait."""
Alternatives = Mapping[int, tuple[float, int]]
"""Log-probability and rank by token, as vLLM reports them for one position."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one message of vLLM says of a request, taken out of its classes."""

    tokens: Sequence[int]
    logprobs: Sequence[Alternatives] | None = None  # of `tokens`
    prompt_logprobs: Sequence[Alternatives | None] | None = None  # once; later outputs have an empty list
    finish_reason: str | None = None  # stop, length, abort, error
    told: Mapping[str, Any] = field(default_factory=dict)  # what the scheduler sent
    cached: int = 0  # prompt tokens found in the prefix cache


@dataclass(slots=True)
class Answer:
    """One request, from its submission to its terminal event."""

    asked: GenerateRequest
    starts: str  # id of the sub-model that is told where the scheduler says nothing
    kv_mode: KVMode = "exact"
    told: Mapping[str, Any] = field(default_factory=dict)  # the last there was
    num_output: int = 0
    cached: int = 0
    accepted: bool = False
    over: bool = False  # its terminal event was made
    first_token: float | None = None
    last_token: float | None = None
    made: Counter[str] = field(default_factory=Counter)
    switches: int = 0
    submodel: str | None = None  # of the last token

    def take(self, output: Output, now: float) -> list[Event]:
        """The events of one output, in order."""
        self.told = output.told or self.told
        self.cached = max(self.cached, output.cached)
        if self.told.get("refused"):
            self.over = True
            message = "under the present load not even the smallest sub-model that is accepted keeps the latency budget"
            return [FailedEvent.of(self.asked.request_id, OverloadedError(message, retry_after=RETRY_SECONDS))]
        submodels = self._submodels(output)
        events: list[Event] = []
        if not self.accepted and (submodels or output.prompt_logprobs or output.finish_reason is not None):
            self.accepted = True
            began = submodels[0] if submodels else self.starts
            predicted, met = self.told.get("foretold") or (None, True)
            queued = max(0.0, float(self.told.get("queue") or 0.0))
            events.append(AcceptedEvent(self.asked.request_id, began, predicted, met, queued, self.cached))
        if output.prompt_logprobs and self.asked.sampling.prompt_logprobs is not None:
            events.append(self._prompt(output.prompt_logprobs))
        wanted = self.asked.sampling.max_tokens - self.num_output
        for place, token in enumerate(output.tokens[:wanted]):
            events.append(self._token(token, submodels[place], output.logprobs, place, now))
        if output.finish_reason is not None:
            self.over = True
            events.append(self._end(output, now))
        return events

    def aborted(self, now: float) -> FinishedEvent:
        """Its terminal event, if nobody wants more of it."""
        self.over = True
        return FinishedEvent(self.asked.request_id, "abort", self.summary(now))

    def _submodels(self, output: Output) -> list[str]:
        """Of the output's tokens, by their places in the answer."""
        first, after = self.num_output, self.num_output + len(output.tokens)
        found: list[str] = []
        last, end = self.starts, 0
        for name, count in self.told.get("submodels") or [[self.starts, after]]:
            begin, end, last = end, end + int(count), str(name)
            found += [last] * (min(end, after) - max(begin, first))  # of a negative number of times: none
        return found + [last] * (len(output.tokens) - len(found))

    def _token(
        self, token: int, submodel: str, logprobs: Sequence[Alternatives] | None, place: int, now: float
    ) -> TokenEvent:
        self.num_output += 1
        self.made[submodel] += 1
        self.switches += self.submodel not in (None, submodel)
        self.submodel = submodel
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now
        wanted = self.asked.sampling.logprobs
        said = None
        if logprobs is not None and wanted is not None:
            said = logprob_of(token, logprobs[place], wanted)
        return TokenEvent(self.asked.request_id, token, submodel, now, said, self._recomputed())

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
        return FinishedEvent(self.asked.request_id, reasons.get(output.finish_reason, "abort"), self.summary(now))

    def _recomputed(self) -> int:
        return int(self.told.get("recomputed_tokens", 0))

    def summary(self, now: float) -> RequestSummary:
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
            refilled_tokens=self._recomputed(),
            cached_tokens=self.cached,
            preemptions=int(self.told.get("preemptions", 0)),
            kv_mode=self.kv_mode,
            queue_seconds=self.told.get("queue"),
            first_token_seconds=None if self.first_token is None else self.first_token - arrival,
            total_seconds=now - arrival,
            met=met,
            cut=bool(self.told.get("cut")),
        )


def logprob_of(token: int, found: Alternatives, wanted: int) -> TokenLogprob:
    """One position's: the token's own, and the `wanted` most probable ones, best first."""
    best = sorted(((rank, other, value) for other, (value, rank) in found.items()), key=lambda each: each[0])
    top = tuple((other, value) for rank, other, value in best if rank <= wanted)
    return TokenLogprob(token, found[token][0], top)
