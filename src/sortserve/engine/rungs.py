"""The ladder in arrays: what policies and the cost model index by place and segment. No torch."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sortserve.engine.ladder import Ladder
from sortserve.engine.settings import SettingsTable

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Rungs:
    """One row per place of the ladder, cheapest first; the last one is the full model.

    `quality` is the ladder's, in [0, 1], made to rise with the place: a policy that takes a dearer rung for less quality
    would be wrong, whatever noise a measurement had.
    """

    exits: Ints  # [places] number of segments that run
    settings: Ints  # [places, segments] id of the layer settings, -1 above the exit
    share: (
        Floats  # [places, segments] FFN neurons that run over all, summed over the segment's layers; 0 above the exit
    )
    layers: Ints  # [segments] layers of each segment
    quality: Floats  # [places]
    default_floor: int  # place
    runs: Bools  # [places, segments] whether the segment is below the exit

    @classmethod
    def of(cls, ladder: Ladder, table: SettingsTable) -> "Rungs":
        """The arrays of `ladder`."""
        places, segments = len(ladder.entries), ladder.num_segments
        bounds = ladder.bounds
        settings = np.full((places, segments), -1, np.int64)
        share = np.zeros((places, segments))
        for place, entry in enumerate(ladder.entries):
            settings[place, : table.exits[place]] = table.targets[place]
            for segment in range(table.exits[place]):
                widths = entry.submodel.widths[bounds[segment] : bounds[segment + 1]]
                share[place, segment] = sum(widths) / ladder.shape.ffn_width
        exits = np.asarray(table.exits, np.int64)
        return cls(
            exits,
            settings,
            share,
            np.array([end - start for start, end in pairwise(bounds)], np.int64),
            np.maximum.accumulate(np.asarray(ladder.qualities, np.float64)),
            ladder.default_floor,
            np.arange(segments) < exits[:, None],
        )

    @property
    def full(self) -> int:
        """Place of the full model."""
        return len(self.exits) - 1

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return len(self.layers)

    @cached_property
    def num_layers(self) -> int:
        """Layers of the full model."""
        return int(self.layers.sum())

    @cached_property
    def depths(self) -> Ints:
        """[places] layers that each runs."""
        depths: Ints = self.runs @ self.layers
        return depths

    @cached_property
    def layers_run(self) -> Floats:
        """[places, segments] layers that a place runs of each segment."""
        return np.where(self.runs, self.layers, 0).astype(np.float64)

    def depth(self, place: int) -> int:
        """Layers that a place runs."""
        return int(self.depths[place])
