"""What a request is told when its first row is planned: where it begins, and how long it will take. No torch."""

from collections.abc import Sequence

from sortserve.engine.foretelling import Foreteller
from sortserve.engine.ladder import Ladder
from sortserve.engine.plan import SequencePlan
from sortserve.engine.policies.protocol import View
from sortserve.engine.protocol import AcceptedEvent
from sortserve.engine.request import Request
from sortserve.engine.rungs import Ints
from sortserve.engine.tally import Tally
from sortserve.engine.traffic import Traffic


class Acceptance:
    """Accepts those who begin, and learns from how long they then took."""

    def __init__(self, ladder: Ladder, tally: Tally) -> None:
        self._ids = [entry.id for entry in ladder.entries]
        self._tally = tally
        self._foreteller = Foreteller()

    @property
    def traffic(self) -> Traffic:
        """Prompts that began of late."""
        return self._foreteller.traffic

    def begin(
        self,
        begun: Sequence[SequencePlan],
        requests: Sequence[Request],
        view: View,
        place: Ints,
        chunk_tokens: int,
        *,
        measured: bool,
    ) -> list[AcceptedEvent]:
        """Tell requests that run for the first time what they start with. All the K/V they have then were cached.

        `requests` are the rows of `view`, with everybody at `place` [n]; `measured`: whether its cost is a measured one.
        """
        first, last = self._foreteller.foretell(view, place, chunk_tokens)
        now = view.now
        rows = {request.id: row for row, request in enumerate(requests)}
        events = []
        for part in begun:
            row = rows[part.request_id]
            request = requests[row]
            request.first_row = now
            if request.asked.sampling.prompt_logprobs is None:
                request.cached_tokens = part.watermark[0]
                self._tally.prefix_queries += request.num_prompt
                self._tally.prefix_hits += request.cached_tokens
            self.traffic.note(now, request.num_prompt - request.cached_tokens)
            arrival = request.asked.arrival
            predicted, met = None, True
            if request.asked.budget is not None and measured:
                request.foretold = float(last[row])
                expected = request.num_output + int(view.expected_left[row])
                coming = float(first[row]), request.foretold
                predicted, met = self._foreteller.told(request.asked.budget, arrival, now, coming, expected)
            submodel = self._ids[request.submodel]
            events.append(AcceptedEvent(request.id, submodel, predicted, met, now - arrival, request.cached_tokens))
        return events

    def ended(self, request: Request, now: float) -> None:
        """A request came to its own end: it was neither cut nor aborted."""
        if request.foretold is not None and request.first_row is not None:
            self._foreteller.ended(request.foretold, now - request.first_row)
