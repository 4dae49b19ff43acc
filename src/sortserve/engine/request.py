"""A request as the scheduler sees it. Who fills what: `scheduler.py` alone writes; policies read."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sortserve.engine.budget import Budget
from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import SampleSpec, SequencePlan
from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.protocol import GenerateRequest, KVMode, RequestSummary, TokenLogprob
from sortserve.engine.sequence_kv import SequenceKV


@dataclass(eq=False, slots=True)
class Request:
    """One sequence, from acceptance to its terminal event. Times in seconds on the engine's clock."""

    asked: GenerateRequest
    kv: SequenceKV
    floor: int  # place in the ladder
    ceiling: int
    kv_mode: KVMode
    seed: int
    tokens: list[int]  # prompt, then output
    plain: bool  # its logits are used as they are: no penalty, bias, minimum length or grammar
    submodel: int = NEVER_RAN
    settled: int = NEVER_RAN  # exact K/V: the place whose settings all its K/V have
    running: bool = False  # holds pages
    made: Counter[int] = field(default_factory=Counter)  # output tokens by place
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    switches: int = 0
    last_switch: int = 0  # number of output tokens at the last switch
    refilled_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    first_row: float | None = None
    foretold: float | None = None  # seconds from there to the last token, by cost model and load alone
    first_token: float | None = None
    last_token: float | None = None
    cut: bool = False
    left: bool = False  # nothing of it will run any more; its last token may still be on its way
    confidence: float = math.nan  # maximum probability of the last token at its exit, where the policy asks for it
    within: tuple[float, ...] | None = None  # by exit: whether the next token needs none deeper, by the depth head
    # whether it can go on before the host has seen its last token: nothing else is asked for, nor does it change the logits
    goes_on_unseen: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.asked.sampling
        self.goes_on_unseen = self.plain and sampling.logprobs is None and sampling.prompt_logprobs is None

    @property
    def id(self) -> str:
        """The id it was submitted with."""
        return self.asked.request_id

    @property
    def num_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.asked.prompt)

    @property
    def num_output(self) -> int:
        """Output tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def tokens_left(self) -> int:
        """Output tokens that it may still produce."""
        return self.asked.sampling.max_tokens - self.num_output

    @property
    def keeps_states(self) -> bool:
        """Whether its exit states are worth keeping: only a request whose depth may grow can need them."""
        return self.floor < self.ceiling

    def due(self, expected_tokens: int) -> float:
        """When its next token, or if nearer in time its last one, is due; inf without a budget."""
        if self.asked.budget is None:
            return float("inf")
        last = self.num_output + expected_tokens
        arrival = self.asked.arrival
        upcoming = self.asked.budget.due(self.num_output + 1, arrival, self.first_token, last)
        return min(upcoming, self.asked.budget.due(last, arrival, self.first_token, last))

    def sample_spec(self) -> SampleSpec:
        """How its next token is drawn."""
        return SampleSpec(
            self.asked.sampling,
            self.seed,
            len(self.tokens),
            self.asked.prompt,
            tuple(self.tokens[self.num_prompt :]) if not self.plain else (),
        )

    def summary(self, ladder: Ladder, now: float) -> RequestSummary:
        """What is told at its end."""
        arrival, budget = self.asked.arrival, self.asked.budget
        return RequestSummary(
            submodels={ladder.entries[place].id: count for place, count in self.made.items()},
            switches=self.switches,
            refilled_tokens=self.refilled_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            kv_mode=self.kv_mode,
            queue_seconds=None if self.first_row is None else self.first_row - arrival,
            first_token_seconds=None if self.first_token is None else self.first_token - arrival,
            total_seconds=now - arrival,
            met=None if budget is None else self._met(budget, now),
            cut=self.cut,
        )

    def _met(self, budget: Budget, now: float) -> bool:
        arrival = self.asked.arrival
        if self.asked.sampling.max_tokens == 0:
            return budget.within_total(arrival, now)
        return budget.met(arrival, self.first_token, self.last_token, self.num_output)


def owner_of(part: SequencePlan, requests: Mapping[str, Request]) -> Request | None:
    """Whose part of a step it is, if that is still alive: another request may have its id by now."""
    request = requests.get(part.request_id)
    return request if request is not None and request.tokens is part.tokens else None
