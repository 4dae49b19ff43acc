"""What the front end of the vLLM back end knows of its scheduler, which is another process: its counters and its costs.

Reports come a few times a second (`reporting.py`). From the costs in them it is told at once whether a strict budget can be
kept, and what one more request would take. No vLLM here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from sortserve.engine.admission import Load, Terms, check_strict
from sortserve.engine.cost import CostTable, StepKind
from sortserve.engine.cost_file import decode_cost
from sortserve.engine.forecast import Forecast
from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import EngineStats, GenerateRequest, Prediction
from sortserve.engine.rungs import Rungs
from sortserve.engine.settings import SettingsTable
from sortserve.engine.vllm.outputs import Answer


class Outlook:
    """The scheduler's last report, and what follows from it."""

    def __init__(self, ladder: Ladder, step_tokens: int, kv_blocks: int) -> None:
        self.cost: CostTable | None = None
        self._ladder = ladder
        self._rungs = Rungs.of(ladder, SettingsTable(ladder))
        self._step_tokens, self._kv_blocks = step_tokens, kv_blocks
        self._report: Mapping[str, Any] = {}
        self._before: Mapping[str, Any] = {}  # what had been counted when clients came

    @property
    def steps(self) -> int:
        """Steps until the last report."""
        return int(self._report.get("steps", 0))

    @property
    def measured_steps(self) -> int:
        """Of them, those that the costs were learned from."""
        return int(self._report.get("decider", {}).get("steps", 0))

    def read(self, content: bytes) -> None:
        """A report has come."""
        self._report = msgspec.msgpack.decode(content)
        cost = self._report.get("decider", {}).get("cost")
        if cost is not None:
            self.cost = decode_cost(cost, "vLLM's scheduler")

    def forget(self) -> None:
        """Count from here on: what ran until now was no client's."""
        self._before = self._report

    # ---- predictions

    def check(self, asked: GenerateRequest, terms: Terms, num_running: int) -> None:
        """Refuse a strict budget that cannot be kept, as `check_strict` does; nobody before costs are known."""
        if self.cost is not None:
            check_strict(asked, terms, Load(self.cost, self._rungs, self._step_tokens, num_running))

    def one_more(self, prompt_tokens: int, answers: Iterable[Answer]) -> dict[str, Prediction]:
        """What one more request of that many prompt tokens would take now, by sub-model id."""
        return self._forecast(answers).one_more(self._ladder, prompt_tokens)

    def _forecast(self, answers: Iterable[Answer]) -> Forecast:
        running = [answer for answer in answers if answer.accepted]
        context = sum(len(answer.asked.prompt) + answer.num_output for answer in running) / max(1, len(running))
        places = Counter(self._ladder.place(answer.submodel or answer.starts) for answer in running)
        return Forecast(self._rungs, self.cost, self._step_tokens, places, context)

    # ---- statistics

    def stats(self, running: int, waiting: int, own: EngineStats) -> EngineStats:
        """A snapshot: what the front end counted itself, and what the scheduler reported."""
        reported = {
            name: self._since(name) for name in ("selected", "switches", "dropped")
        }  # "id reason" of what was selected
        errors: dict[StepKind, tuple[int, float, float]] = {
            kind: (int(steps), float(median), float(covered))
            for kind, (steps, median, covered) in self._report.get("decider", {}).get("errors", {}).items()
        }
        selected: dict[tuple[str, str], int] = {}
        for names, count in reported["selected"].items():
            submodel, _, reason = names.rpartition(" ")
            selected[submodel, reason] = count
        dropped = Counter(own.dropped)
        dropped["overloaded"] += reported["dropped"].get("refused", 0)
        return msgspec.structs.replace(
            own,
            running=running,
            waiting=waiting,
            kv_pages_total=self._kv_blocks,
            kv_pages_used=round(self._kv_blocks * float(self._report.get("kv_usage", 0.0))),
            steps=self.steps,
            selected=selected,
            switches=reported["switches"],
            dropped={reason: count for reason, count in dropped.items() if count},
            step_errors=errors,
        )

    def _since(self, name: str) -> dict[str, int]:
        before = self._before.get(name, {})
        since = {key: int(count) - int(before.get(key, 0)) for key, count in self._report.get(name, {}).items()}
        return {key: count for key, count in since.items() if count}
