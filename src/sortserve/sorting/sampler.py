"""Which sub-models a pass trains: all exits at once (SoFT), or points drawn from the grid (SortedNet).

Contract: `passes_of(update)` is a pure function of the seed and the update's number, so a resumed run draws what the
uninterrupted one would have, and needs no state to be saved.
"""

import random
from dataclasses import dataclass

from sortserve.engine.errors import SortingError
from sortserve.sorting.nested import SubModels
from sortserve.sorting.recipe import Grid, Method


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass: what runs, each exit's weight in its loss, and the adapter rank (0: all)."""

    chosen: SubModels
    scale: tuple[float, ...]
    rank: int = 0


@dataclass(frozen=True)
class Sampler:
    """Draws passes. `exits` and `widths` are ascending and end in the full model's."""

    exits: tuple[int, ...]
    widths: tuple[int, ...]
    method: Method
    seed: int
    max_rank: int = 0
    """Of a rank-sorted adapter; 0: ranks are not drawn."""

    @classmethod
    def make(
        cls, grid: Grid, method: Method, layers: int, ffn_width: int, seed: int, alone: bool = False, max_rank: int = 0
    ) -> "Sampler":
        """Raises SortingError if the grid is not one of the model, or has fewer exits than a pass is to draw."""
        exits = sorted({*([] if alone else grid.exits), layers})
        widths = sorted({*([] if alone else grid.widths), ffn_width})
        if exits[-1] > layers or widths[-1] > ffn_width:
            raise SortingError(
                f"the grid goes to depth {exits[-1]} and width {widths[-1]}, the model has {layers} layers of {ffn_width}"
            )
        if method.exits_per_pass > len(exits) and not alone:
            raise SortingError(f"method.exits_per_pass is {method.exits_per_pass}, there are {len(exits)} exits")
        return cls(tuple(exits), tuple(widths), method, seed, max_rank)

    @property
    def grid(self) -> list[tuple[int, int]]:
        """All (exit, width)."""
        return [(depth, width) for depth in self.exits for width in self.widths]

    def passes_of(self, update: int) -> list[Pass]:
        """What update number `update` (from 0) is made of."""
        rng = random.Random(f"{self.seed}/{update}")
        return [self._draw(rng) for _ in range(self.method.passes)]

    def _draw(self, rng: random.Random) -> Pass:
        rank = rng.randint(1, self.max_rank) if self.max_rank else 0
        if self.method.kind == "sorted":
            depth, width = rng.choice(self.grid)
            return Pass(SubModels((depth,), width, self._dropped(rng, depth)), (1.0,), rank)
        narrow = self.widths[:-1]
        width = rng.choice(narrow) if narrow and rng.random() >= self.method.full_width_share else self.widths[-1]
        exits, scale = self._draw_exits(rng)
        return Pass(SubModels(exits, width, self._dropped(rng, exits[-1])), scale, rank)

    def _draw_exits(self, rng: random.Random) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The deepest exit and some others; these weigh so much more that the mean over draws is that of all exits."""
        inner = self.exits[:-1]
        if not inner:
            return self.exits, (1.0,)
        wanted = self.method.exits_per_pass
        drawn = sorted(rng.sample(inner, wanted - 1)) if wanted else list(inner)
        full = self.method.full_weight or 1 / len(self.exits)
        each = (1 - full) / len(drawn) if drawn else 0.0
        return (*drawn, self.exits[-1]), (*(each for _ in drawn), full)

    def _dropped(self, rng: random.Random, depth: int) -> frozenset[int]:
        most, last = self.method.layer_dropout, max(1, self.exits[-1] - 1)
        return frozenset(layer for layer in range(depth) if most and rng.random() < most * layer / last)
