"""What each step held and how long it took, seen from vLLM's scheduler."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from sortserve.engine.vllm.deciding import MeasuredStep, Rows


class StepClock:
    """Pairs schedulings with outputs, which vLLM delivers in order. Seconds on one clock."""

    def __init__(self) -> None:
        self._open: deque[tuple[int, float, dict[int, Rows], bool]] = deque()
        self._last_end = 0.0
        self._went_on = False  # somebody was left then, who waits until the next step

    def scheduled(self, output: Any, places: Mapping[str, int], requests: Mapping[str, Any], now: float) -> None:
        """A step has been scheduled, at `now`; steps without rows are not measured."""
        if not output.num_scheduled_tokens:
            return
        rows: dict[int, Rows] = {}
        had_prompt = False
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            context = request.num_computed_tokens  # these rows included
            pairs = tokens * (context - tokens / 2) if tokens > 1 else 0.0
            before = rows.get(places[request_id], Rows())
            rows[places[request_id]] = Rows(
                before.rows + tokens, before.requests + 1, before.context + context, before.pairs + pairs
            )
            had_prompt |= tokens > 1 or request.is_prefill_chunk
        self._open.append((id(output), now, rows, had_prompt))

    def finished(self, output: Any, now: float, *, goes_on: bool) -> MeasuredStep | None:
        """Its outputs are there; None for a step that is not measured. `goes_on`: requests are left, so that whatever is
        done until the next step has been scheduled delays them."""
        while self._open and self._open[0][0] != id(output) and any(number == id(output) for number, *_ in self._open):
            self._open.popleft()  # its outputs were dropped
        if not self._open or self._open[0][0] != id(output):
            return None
        _, began, rows, had_prompt = self._open.popleft()
        between = max(0.0, began - self._last_end) if self._went_on else None
        seconds = now - max(began, self._last_end)
        self._last_end, self._went_on = now, goes_on
        return MeasuredStep(rows, seconds, had_prompt, between)
