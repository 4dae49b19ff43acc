"""A decider that does what a test says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sortserve.engine.policies.protocol import Reason
from sortserve.engine.vllm.deciding import Answer, Decider, MeasuredStep, Setup, Standing


@dataclass
class Programmed:
    """`program`: by number of prompt tokens, (from this output token on, this place), ascending. Others run their
    ceiling. `refuse` and `cut`: numbers of prompt tokens, and of output tokens at which to cut.
    `order`: numbers of prompt tokens, whose turn comes first; none: vLLM's order."""

    setup: Setup
    program: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    refuse: set[int] = field(default_factory=set)
    cut: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    steps: list[MeasuredStep] = field(default_factory=list)
    seen: list[tuple[Standing, ...]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # output tokens of those that came to their own end

    def decide(self, requests: Sequence[Standing], now: float) -> Answer:
        """See Decider."""
        self.seen.append(tuple(requests))
        places = {}
        for request in requests:
            wanted = [place for start, place in self.program.get(request.num_prompt, []) if request.num_output >= start]
            places[request.request_id] = wanted[-1] if wanted else request.ceiling
        return Answer(
            places,
            {request.request_id: Reason.FIXED for request in requests},
            frozenset(request.request_id for request in requests if request.num_prompt in self.refuse),
            frozenset(
                request.request_id
                for request in requests
                if request.num_output >= self.cut.get(request.num_prompt, 1 << 30)
            ),
            order=tuple(
                request.request_id
                for request in sorted(requests, key=lambda request: self.order.index(request.num_prompt))
            )
            if self.order
            else (),
        )

    def measured(self, step: MeasuredStep) -> None:
        """See Decider."""
        self.steps.append(step)

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        """See Decider."""
        self.ends.append(num_output)

    def stats(self) -> Mapping[str, Any]:
        """See Decider."""
        return {"steps": len(self.steps)}


def programmed(setup: Setup) -> Decider:
    """The factory that the configuration names."""
    return Programmed(setup)
