"""What is kept of one HTTP request while it is served, and what is told of it at its end: to metrics, log and traces."""

import re
from dataclasses import dataclass

from sortserve.engine import logs
from sortserve.server.answer import all_met, first_token_seconds, per_token_seconds, tokens_by_submodel
from sortserve.server.completions import Generation
from sortserve.server.keys import NO_BOUNDS, Bounds, Key
from sortserve.server.metrics import Served

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # goes into headers and log lines
CLIENT_GONE = 499  # nginx's number for it; never sent, only counted


@dataclass
class Record:
    """One HTTP request, as `request.state.record`. Times are of `time.monotonic()`."""

    request_id: str
    id_was_given: bool
    started: float  # when its head was read
    arrival: float  # when its last byte was read; `started` until then
    key: Key | None = None
    generation: Generation | None = None
    status: int = 0  # 0 until the response begins

    @property
    def bounds(self) -> Bounds:
        """What the request's key may ask for."""
        return NO_BOUNDS if self.key is None else self.key.bounds

    def rename(self, request_id: str) -> None:
        """Call the request what its body calls it, in the log too."""
        self.request_id = request_id
        logs.request_id.set(request_id)

    def served(self, endpoint: str, now: float) -> Served:
        """What the metrics count of a request that generates, ended at `now`."""
        generation = self.generation
        if generation is None:
            return Served(endpoint, self.status, "none", now - self.arrival)
        job, answers, budget = generation.job, generation.answers, generation.job.terms.budget
        complete = all(answer.finish_reason is not None for answer in answers)
        last = max((answer.last_time for answer in answers if answer.last_time is not None), default=None)
        outcome = None
        if budget is not None:
            met = complete and all_met(job, answers, now if last is None else last)
            outcome = "met" if met else "missed" if generation.accepted else "refused"
        if complete:
            reason = answers[0].finish_reason or "stop"
        elif self.status == CLIENT_GONE:
            reason = "abort"
        else:
            reason = "error" if generation.accepted else "none"
        return Served(
            endpoint,
            self.status,
            reason,
            now - self.arrival,
            generation.submodel,
            None if budget is None else budget.policy,
            outcome,
            None if budget is None or budget.total_ms is None else budget.total_ms / 1e3,
            generation.predicted_seconds,
            generation.accepted[0].queue_seconds if generation.accepted else None,
            first_token_seconds(job, answers),
            per_token_seconds(answers),
            last - job.arrival if complete and last is not None else None,
            tokens_by_submodel(answers) if complete else {},
        )
