"""Which rows of logits become tokens, and how: what the runners of all devices hand to their samplers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sortserve.engine.errors import RequestError
from sortserve.engine.plan import SequencePlan, SequenceResult
from sortserve.engine.sampler import SamplingRow

if TYPE_CHECKING:  # a GPU's benchmarks run without llguidance
    from sortserve.engine.grammar import Grammars


@dataclass(slots=True)
class Drawing:
    """One entry per sequence that draws, in the plan's order; `failed` are those whose grammar cannot go on."""

    names: list[str] = field(default_factory=list)  # request ids
    places: list[int] = field(default_factory=list)  # rows of the logits
    rows: list[SamplingRow] = field(default_factory=list)
    failed: dict[str, SequenceResult] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sampling: Iterable[tuple[SequencePlan, int]], grammars: "Grammars | None", eos: tuple[int, ...]
    ) -> "Drawing":
        """Of sequences that want a token, each with the row of its logits. A grammar's error ends its request only."""
        made = cls()
        for part, place in sampling:
            spec = part.sample
            assert spec is not None
            allowed = None
            if spec.params.grammar is not None:
                assert grammars is not None
                try:
                    allowed = grammars.allowed(part.request_id, spec.params.grammar, spec.output)
                except RequestError as error:
                    made.failed[part.request_id] = SequenceResult(None, error=error.message)
                    continue
            made.names.append(part.request_id)
            made.places.append(place)
            made.rows.append(SamplingRow(spec.params, spec.seed, spec.position, spec.prompt, spec.output, eos, allowed))
        return made
