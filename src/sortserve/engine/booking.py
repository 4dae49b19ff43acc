"""What a finished step means for a request: the tokens it got, whether it is over, and what its client is told."""

from collections.abc import Iterable
from typing import Literal

from sortserve.engine.ladder import Ladder
from sortserve.engine.lengths import AnswerLengths
from sortserve.engine.plan import PENDING, SequencePlan, SequenceResult
from sortserve.engine.protocol import Event, PromptLogprobsEvent, TokenEvent
from sortserve.engine.request import Request
from sortserve.engine.tally import Tally

Ending = Literal["stop", "length", "error"]


class Books:
    """Appends what was drawn and counts it. Ends nothing itself: that gives pages back, which is the scheduler's."""

    def __init__(self, ladder: Ladder, tally: Tally, lengths: AnswerLengths, eos_token_ids: Iterable[int]) -> None:
        self._ids = [entry.id for entry in ladder.entries]
        self._tally = tally
        self._lengths = lengths
        self._eos = frozenset(eos_token_ids)

    def book(
        self, request: Request, part: SequencePlan, gave: SequenceResult, now: float, events: list[Event]
    ) -> Ending | None:
        """Book one request's part; adds its events to `events`, and says how it ended if it did."""
        sampling = request.asked.sampling
        if sampling.prompt_logprobs is not None:
            self._book_prompt(request, part, gave, events)
        if gave.error is not None:
            return "error"
        token = gave.token
        if token is None:
            return "length" if part.spans[-1].stop == request.num_prompt and sampling.max_tokens == 0 else None
        if request.tokens[-1] == PENDING:
            request.tokens[-1] = token
        else:
            request.tokens.append(token)
        request.made[part.submodel] += 1
        if request.first_token is None:
            request.first_token = now
        request.last_token = now
        if gave.confidence is not None:
            request.confidence, request.within = gave.confidence, gave.within
        submodel = self._ids[part.submodel]
        self._tally.generated[submodel] += 1
        events.append(TokenEvent(part.request_id, token, submodel, now, gave.logprob, request.refilled_tokens))
        stopped = (token in self._eos and not sampling.ignore_eos) or token in sampling.stop_token_ids
        num_output = len(request.tokens) - len(request.asked.prompt)
        if not stopped and num_output < sampling.max_tokens:
            return None
        self._lengths.observe(num_output)
        return "stop" if stopped else "length"

    def _book_prompt(self, request: Request, part: SequencePlan, gave: SequenceResult, events: list[Event]) -> None:
        if gave.prompt_logprobs:
            known = len(request.prompt_logprobs) - part.start - 1  # these ran before a preemption or refill
            request.prompt_logprobs.extend(gave.prompt_logprobs[known:])
            if known < len(gave.prompt_logprobs) and len(request.prompt_logprobs) == request.num_prompt:
                events.append(PromptLogprobsEvent(request.id, tuple(request.prompt_logprobs)))
        if part.stop == request.num_prompt == 1 and request.num_output == 0:
            events.append(PromptLogprobsEvent(request.id, (None,)))
