"""Ids for layer settings: what a row carries instead of a tuple of widths and skips per layer."""

from sortserve.engine.ladder import Ladder
from sortserve.engine.submodel import LayerSettings


class SettingsTable:
    """For each place of a ladder, the id of its layer settings in each segment that it runs.

    Two places have the same id in a segment if and only if they run its layers alike.
    """

    def __init__(self, ladder: Ladder) -> None:
        bounds = ladder.bounds
        self._settings: list[list[LayerSettings]] = [[] for _ in range(ladder.num_segments)]
        self.exits: list[int] = []  # by place: segments that run
        self.targets: list[tuple[int, ...]] = []  # by place: [exit] settings ids
        for entry in ladder.entries:
            exit = ladder.exits.index(entry.submodel.depth) + 1
            ids = []
            for segment in range(exit):
                known = self._settings[segment]
                settings = entry.submodel.settings(bounds[segment], bounds[segment + 1])
                if settings not in known:
                    known.append(settings)
                ids.append(known.index(settings))
            self.exits.append(exit)
            self.targets.append(tuple(ids))

    def settings(self, segment: int, settings_id: int) -> LayerSettings:
        """(width, attention on) of each layer of a segment."""
        return self._settings[segment][settings_id]

    def num_settings(self, segment: int) -> int:
        """How many different settings the ladder has in a segment."""
        return len(self._settings[segment])

    def compatible(self, place: int) -> list[int]:
        """Places, ascending, that differ from `place` in depth alone: switching among them recomputes nothing."""
        own = self.targets[place]
        return [
            other
            for other, target in enumerate(self.targets)
            if all(mine == theirs for mine, theirs in zip(own, target, strict=False))
        ]
