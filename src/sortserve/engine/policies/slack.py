"""`slack`: as many budgets kept as possible, and then as much quality, by a price for machine time that follows the load.

Each request takes the place where the quality it gains, over the tokens it still has to make, exceeds the price of the machine
time it would take from its present state: prompt, refill or recompute, and answer. So a long request steps down before a
short one, work done already counts for going on with it, a promotion must pay back its refill, and a place that lies below
the line between its neighbours is never taken. By duality that is how the best solution of the fluid problem looks.

The price is found by search from step to step: a few neighbours of the present setting are forecast, and the best is taken.
Three more numbers are searched with it: a cap for all rows (a step is as slow as its deepest row, so at small batches only
lowering all of them helps), a density below which requests are given up for the others' sake, and the rows of prompts in a step.
"""

from dataclasses import dataclass, replace

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.clock import Clock
from sortserve.engine.policies.outlook import Forecast, Outlook
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Reason, View
from sortserve.engine.rungs import Bools, Floats, Ints

_LEVELS = 64
_PRICES = np.concatenate([[0.0], 0.01 * 1.25 ** np.arange(1, _LEVELS)])
"""Quality per second of machine time by level: from nothing to what no request is worth (13,000)."""
_PARTS = (1.0, 0.5, 0.25, 0.125)
"""Of the most rows that a step takes, for prompts and refills."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is searched. All zero: everybody gets the best."""

    price: int = 0  # level
    given_up: int = 0  # level of density: quality per second of machine time; 0 gives nobody up
    below_full: int = 0  # the cap's distance from the full model
    part: int = 0  # index of _PARTS
    alone: bool = False  # rows without a budget sit out, except in every `turn`th step

    def neighbours(self, places: int) -> list["Setting"]:
        """This one first, then those that promise more for less, then those that give up more."""
        tries = [
            *(replace(self, price=self.price + d) for d in (-1, -4, 1, 2, 5, 12)),
            *(replace(self, given_up=self.given_up + d) for d in (-1, -4, 1, 4)),
            *(replace(self, below_full=self.below_full + d) for d in (-1, 1, 3)),
            *(replace(self, part=self.part + d) for d in (-1, 1)),
            replace(self, alone=not self.alone),
        ]
        if self.given_up == 0:  # the first to go are the dearest, wherever that begins
            tries += [replace(self, given_up=level) for level in (16, 24, 32, 40)]
        limits = (("price", _LEVELS), ("given_up", _LEVELS), ("below_full", places), ("part", len(_PARTS)))
        inside = [s.bounded(limits) for s in tries]
        return list(dict.fromkeys([self, *inside]))

    def bounded(self, limits: tuple[tuple[str, int], ...]) -> "Setting":
        """The nearest one that exists."""
        return replace(self, **{name: min(max(getattr(self, name), 0), limit - 1) for name, limit in limits})

    def gives_up_less(self, other: "Setting") -> bool:
        """Whether this is a relaxation of another one."""
        mine = (self.price, self.given_up, self.below_full, self.alone)
        return mine != (theirs := (other.price, other.given_up, other.below_full, other.alone)) and all(
            a <= b for a, b in zip(mine, theirs, strict=True)
        )


class Slack:
    """See the module.

    `margin`: how much longer than predicted everything may take before it counts as late; `relax_margin`: the same for a
    step back to more quality; `attainment`: what a kept budget is worth beside its quality; `hold_tokens`: between two
    changes of a request, unless they go down; `turn`: see `Setting.alone`.
    """

    name = "slack"

    def __init__(
        self,
        margin: float = 1.2,
        relax_margin: float = 1.4,
        attainment: float = 2.0,
        hold_tokens: int = 8,
        turn: int = 8,
    ) -> None:
        self._margin, self._relax_margin = margin, relax_margin
        self._attainment, self._hold_tokens, self._turn = attainment, hold_tokens, turn
        self._setting = Setting()
        self._clock = Clock()

    def decide(self, view: View) -> Decision:
        """See the module."""
        outlook = self._clock.look(view)
        value = self._value(outlook)
        settings = self._setting.neighbours(len(view.rungs.exits))
        hopeless = outlook.hopeless(view.floor)
        place, dropped = self._candidates(outlook, value, settings, hopeless)
        sits = dropped | (np.array([s.alone for s in settings])[:, None] & ~view.budgeted & view.running)
        chunk = np.array([_PARTS[s.part] for s in settings]) * view.step_tokens
        forecast = outlook.foresee(np.where(sits, SITS_OUT, place), chunk)
        chosen = self._best(outlook, value, settings, forecast, place, dropped)
        self._setting = settings[chosen]
        self._clock.note(view, forecast, chosen, float(chunk[chosen]))
        gone = dropped[chosen] | turned_away(outlook, forecast, chosen, view.floor)
        reason = self._reasons(view, outlook, forecast, chosen, place[chosen])
        final = np.where(gone, view.floor, place[chosen])
        if self._setting.alone and self._clock.decisions % self._turn and "sit_out" in view.capabilities:
            final = np.where(~view.budgeted & view.running, SITS_OUT, final)
        return settle(outlook, final, reason, gone, int(chunk[chosen]), self._clock.decisions)

    @staticmethod
    def _value(outlook: Outlook) -> Floats:
        """[n, places] mean quality of the whole answer if the rest were made there. What was made counts as made on the
        present place."""
        view = outlook.view
        quality, made = view.rungs.quality, view.num_output.astype(np.float64)
        so_far = quality[np.maximum(view.place, 0)] * made
        value: Floats = (so_far[:, None] + quality * outlook.left[:, None]) / (made + outlook.left)[:, None]
        return value

    def _candidates(
        self, outlook: Outlook, value: Floats, settings: list[Setting], hopeless: Bools
    ) -> tuple[Ints, Bools]:
        """Places [k, n], and who is given up [k, n]."""
        view = outlook.view
        places = np.arange(len(view.rungs.exits))
        held = (view.place != NEVER_RAN) & (view.tokens_since_switch < self._hold_tokens)
        top = np.where(held, np.clip(view.place, view.floor, view.ceiling), view.ceiling)
        barred = (places < view.floor[:, None]) | (places > top[:, None])
        worth = np.where(barred, -np.inf, value)[:, ::-1]  # the highest place first: it wins ties
        cost = outlook.cost[:, ::-1]
        levels = sorted({s.price for s in settings})
        priced = worth - _PRICES[levels][:, None, None] * cost
        best = len(places) - 1 - priced.argmax(-1)  # [levels, n]
        best = best[[levels.index(s.price) for s in settings]]
        cap = view.rungs.full - np.array([s.below_full for s in settings])
        best = np.maximum(np.minimum(best, cap[:, None]), view.floor)
        every = np.arange(len(view))
        # equals differ a little, or all would be given up at once
        spread = 0.8 + 0.4 * np.modf(np.abs(view.arrival) * 7919.0)[0]
        density = spread * value[every, view.floor] / np.maximum(outlook.cost[every, view.floor], 1e-12)
        least = _PRICES[[s.given_up for s in settings]]
        return best, view.budgeted & ((density < least[:, None]) | hopeless)

    def _best(
        self,
        outlook: Outlook,
        value: Floats,
        settings: list[Setting],
        forecast: Forecast,
        place: Ints,
        dropped: Bools,
    ) -> int:
        """The candidate under which those in time are worth most."""
        view = outlook.view
        relaxed = np.array([s.gives_up_less(self._setting) for s in settings])
        late = forecast.late(view, np.where(relaxed, self._relax_margin, self._margin))
        counts = view.budgeted & ~dropped & ~late
        worth = np.where(counts, value[np.arange(len(view)), place] + self._attainment, 0.0).sum(1)
        worth -= 1e-6 * np.array([s.price + s.given_up + s.below_full + s.part + s.alone for s in settings])
        return int(worth.argmax())

    @staticmethod
    def _reasons(view: View, outlook: Outlook, forecast: Forecast, chosen: int, place: Ints) -> Ints:
        """[n] its own deadline if it would miss that at its ceiling with everything else as it is, else the others'."""
        every = np.arange(len(view))
        factor = outlook.factor * (outlook.prices.row[view.ceiling] / outlook.depth[view.ceiling])
        extra = (outlook.work[every, view.ceiling] - outlook.work[every, place]) * factor
        own = forecast.last[chosen] + extra > view.last_due - view.now
        own |= (forecast.first[chosen] + extra > view.first_due - view.now) & (view.num_output == 0)
        reason = np.where(own, int(Reason.DEADLINE), int(Reason.OTHERS))
        reason = np.where((place == view.place) & (view.tokens_since_switch == 0), int(Reason.HOLD), reason)
        best = np.where(view.floor == view.ceiling, int(Reason.PINNED), int(Reason.BEST))
        return np.where(place == view.ceiling, best, reason)
