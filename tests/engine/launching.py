"""A runner that can be launched ahead of its results, out of one that cannot: it runs at once, and keeps what it drew."""

from dataclasses import dataclass

import msgspec

from sortserve.engine.plan import PENDING, Plan, StepResult, StepRunner


@dataclass(frozen=True)
class Done:
    """A step that ran when it was launched."""

    given: StepResult

    def result(self) -> StepResult:
        return self.given


class LateTokens:
    """Puts the tokens of the last step where a plan has PENDING ones, as a device does that keeps its ids."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self._drew: dict[str, int] = {}

    def run(self, plan: Plan) -> StepResult:
        parts = []
        for part in plan.sequences:
            tokens = list(part.tokens[: part.stop])
            assert PENDING not in tokens[:-1], "only the last token can be on its way"
            if tokens[-1] == PENDING:
                tokens[-1] = self._drew[part.request_id]
            parts.append(msgspec.structs.replace(part, tokens=tokens))
        result = self.runner.run(msgspec.structs.replace(plan, sequences=tuple(parts)))
        given = zip(plan.sequences, result.sequences, strict=True)
        self._drew = {part.request_id: one.token for part, one in given if one.token is not None}
        return result

    def launch(self, plan: Plan) -> Done:
        return Done(self.run(plan))
