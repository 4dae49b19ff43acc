"""What begins of late: so many prompts a second, of so many rows each. Predictions take them to go on coming. No torch."""

from collections import deque

SECONDS = 1.0
"""Over which it is counted: a burst must be seen while it lasts."""
MOST = 4096
"""Requests remembered."""


class Traffic:
    """Requests that began to run. Those that are refused cost nothing and do not count."""

    def __init__(self) -> None:
        self._begun: deque[tuple[float, int]] = deque(maxlen=MOST)  # when, prompt rows to compute
        self._rows = 0

    def note(self, now: float, rows: int) -> None:
        """A request runs for the first time, with `rows` of its prompt not in the prefix cache. A step that is planned
        beside the one before it is noted for that one's predicted end, the next one maybe for a moment before that."""
        if self._begun and now < self._begun[-1][0]:
            if now < self._begun[-1][0] - SECONDS:  # the clock was set back
                self._begun.clear()
                self._rows = 0
            else:
                now = self._begun[-1][0]
        if len(self._begun) == MOST:
            self._rows -= self._begun.popleft()[1]
        self._begun.append((now, rows))
        self._rows += rows

    def rate(self, now: float) -> float:
        """Requests a second."""
        while self._begun and self._begun[0][0] < now - SECONDS:
            self._rows -= self._begun.popleft()[1]
        return len(self._begun) / SECONDS

    @property
    def rows(self) -> float:
        """Prompt rows of one, on average."""
        return self._rows / max(len(self._begun), 1)
