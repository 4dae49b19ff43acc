"""`slack`: as many budgets kept as possible, and then as much quality, by a price for machine time that follows the load.

Each request takes the place that maximises its mean quality minus the price of the machine time it still needs from its
present state: prompt, refill or recompute, and answer. It is given up where even that, with what a kept budget is worth
beside quality, is below nothing. So a long request steps down before a short one, work done already counts for going on with
it, a promotion must pay back its refill, and a place below the line between its neighbours is never taken. By duality that
is how the best solution of the fluid problem looks; `market.py` finds the price.

Prices know work, but not steps. What remains is searched from decision to decision among neighbours of the present setting,
each of which is forecast: the rows of prompts in a step, a cap for all rows (a step is as slow as its deepest row, so at
small batches only lowering all of them helps), whether rows without a budget pause, and a surcharge on the price while
deadlines are at risk. The surcharge takes quality, never budgets: nobody is given up but for what the market asks.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from sortserve.engine.policies.admission import settle, turned_away
from sortserve.engine.policies.lookout import Lookout
from sortserve.engine.policies.market import LEVELS, Bids, Market
from sortserve.engine.policies.outlook import Forecast, Outlook
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Reason, View
from sortserve.engine.rungs import Bools, Floats, Ints

_PARTS = (1.0, 0.5, 0.25, 0.125)
"""Of the most rows that a step takes, for prompts and refills."""
_FEW = 0.25
"""The same where it is asked whether anything could still help a request that waits."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is searched. All zero: everybody gets the best that the price allows."""

    surcharge: int = 0  # levels of price
    below_full: int = 0  # the cap's distance from the full model
    part: int = 0  # index of _PARTS
    pause: bool = False  # rows without a budget sit out, except in every `turn`th step

    def relaxes(self, other: "Setting") -> bool:
        """Whether this gives up less than another one."""
        mine = (self.surcharge, self.below_full, self.pause)
        theirs = (other.surcharge, other.below_full, other.pause)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@lru_cache(maxsize=4096)
def neighbours(setting: Setting, places: int, turn: int) -> tuple[Setting, ...]:
    """The setting itself first, then those next to it in one of the directions, by turns: forecasts take time. In every
    second turn only the setting itself."""
    moved: list[Setting] = []
    if turn % 6 == 1:
        near = [min(max(setting.surcharge + d, 0), LEVELS - 1) for d in (-2, 2, 8)]
        moved = [replace(setting, surcharge=s) for s in [*near, 0]]  # 0: the market may ask enough by now
    elif turn % 6 == 3:
        moved = [replace(setting, below_full=min(max(setting.below_full + d, 0), places - 1)) for d in (-1, 1, 3)]
        moved += [replace(s, pause=True) for s in moved[1:]]  # one without the other may help nobody
    elif turn % 6 == 5:
        moved = [replace(setting, part=min(max(setting.part + d, 0), len(_PARTS) - 1)) for d in (-1, 1)]
        moved.append(replace(setting, pause=not setting.pause))
    return tuple(dict.fromkeys((setting, *moved)))


class Slack:
    """See the module.

    `margin`: how much longer than predicted everything may take before it counts as late; `relax_margin`: the same for a
    step back to more quality; `attainment`: what a kept budget is worth beside its quality; `utilisation`: the share that
    is sold of the machine time that can be counted on; `reserve`: the share of that which is not for quality, only for
    budgets; `hold_tokens`: between two changes of a request, unless they go down; `turn`: see `Setting.pause`.
    """

    name = "slack"

    def __init__(
        self,
        margin: float = 1.2,
        relax_margin: float = 1.4,
        attainment: float = 1.0,
        utilisation: float = 1.0,
        reserve: float = 0.1,
        hold_tokens: int = 8,
        turn: int = 8,
    ) -> None:
        self._margin, self._relax_margin = margin, relax_margin
        self._attainment, self._hold_tokens, self._turn = attainment, hold_tokens, turn
        self._setting = Setting()
        self._market = Market(utilisation, reserve, attainment)
        self._lookout = Lookout()

    def decide(self, view: View) -> Decision:
        """See the module."""
        outlook = self._lookout.look(view)
        value = self._value(outlook)
        worth = self._worth(outlook, value)
        self._market.learn(outlook, worth)
        bids = self._bids(outlook, worth)
        is_old = self._market.is_old(view.now)
        if is_old:  # after a pause: what was found then is of another load
            self._setting = Setting()
        if is_old or self._lookout.decisions % 2 == 0:  # in turns with the search
            self._market.clear(outlook, bids)
        settings = neighbours(self._setting, len(view.rungs.exits), self._lookout.decisions)
        asked = sorted({0, *(s.surcharge for s in settings)})
        which = [asked.index(s.surcharge) for s in settings]
        ahead, rest = (
            self._market.prices(np.minimum(levels + np.array(asked)[:, None], LEVELS - 1))
            for levels in self._market.levels_of(outlook)
        )
        places, given_up = bids.at(ahead, rest)
        place, dropped = places[which], given_up[0]
        if dropped.any() and self._floor_will_do(outlook):
            dropped = np.zeros_like(dropped)
        cap = view.rungs.full - np.array([s.below_full for s in settings])
        place = np.maximum(np.minimum(place, cap[:, None]), view.floor)
        hopeless = outlook.hopeless(view.floor)
        dropped = dropped | hopeless
        pauses = np.array([s.pause and "sit_out" in view.capabilities for s in settings])
        sits = dropped | (pauses[:, None] & ~view.budgeted & view.running)  # [k, n]
        # the last two: everybody at the floor, with as many rows of prompts as now, and with few
        tried = np.concatenate([np.where(sits, SITS_OUT, place), view.floor[None], view.floor[None]])
        chunk = np.array([*(_PARTS[s.part] for s in (*settings, self._setting)), _FEW]) * view.step_tokens
        forecast = outlook.foresee(tried, chunk)
        waste = self._market.price_of(outlook.prices.fixed / np.maximum(forecast.step, 1e-9))
        margin = [self._relax_margin if s.relaxes(self._setting) else self._margin for s in settings]
        late = forecast.late(view, np.array([*margin, 1.0, 1.0]))
        chosen = self._best(outlook, value, settings, late[:-2], np.where(dropped, SITS_OUT, place), waste[:-2])
        self._setting = settings[chosen]
        few, many = late[-2:]
        gone = dropped | turned_away(outlook, few & many, hopeless)
        reason = self._reasons(outlook, forecast, chosen, place[chosen])
        final = np.where(gone, view.floor, place[chosen])
        if self._setting.pause and self._lookout.decisions % self._turn and "sit_out" in view.capabilities:
            final = np.where(~view.budgeted & view.running, SITS_OUT, final)
        return settle(outlook, final, reason, gone, int(chunk[chosen]), self._lookout.decisions)

    def _floor_will_do(self, outlook: Outlook) -> bool:
        """Whether everybody would be in time at the floor, with the margin to spare, and nobody without a budget waits for
        his prompt, whom that would delay: then nobody need be given up."""
        view = outlook.view
        if (~view.budgeted & (view.known - view.computed[:, 0] > 1)).any():
            return False
        chunk = np.array([_PARTS[self._setting.part], _FEW]) * view.step_tokens
        late = outlook.foresee(np.stack([view.floor, view.floor]), chunk).late(view, self._margin)
        return not (late & view.budgeted).any(axis=1).all()

    @staticmethod
    def _value(outlook: Outlook) -> Floats:
        """[n, places] mean quality of the whole answer if the rest were made there. What was made counts as made on the
        present place."""
        view = outlook.view
        quality, made = view.rungs.quality, view.num_output.astype(np.float64)
        so_far = quality[np.maximum(view.place, 0)] * made
        value: Floats = (so_far + quality[:, None] * outlook.left) / (made + outlook.left)  # [places, n], see Outlook
        return value.T

    def _worth(self, outlook: Outlook, value: Floats) -> Floats:
        """[n, places] the value; -inf outside of floor and ceiling, above the present place soon after a change, and where
        the request would be late even alone: a price sees machine time, not how long one answer takes."""
        view = outlook.view
        places = np.arange(len(view.rungs.exits))[:, None]
        held = (view.place != NEVER_RAN) & (view.tokens_since_switch < self._hold_tokens) & (view.num_output > 0)
        top = np.where(held, np.clip(view.place, view.floor, view.ceiling), view.ceiling)
        rises = (view.place != NEVER_RAN) & (places > view.place)  # [places, n], as below
        late = outlook.late_alone(np.where(rises, self._relax_margin, self._margin).T).T
        barred = (places < view.floor) | (places > top) | (late & (places != view.floor))
        return np.where(barred, -np.inf, value.T).T

    def _bids(self, outlook: Outlook, worth: Floats) -> Bids:
        view = outlook.view
        # what a promotion costs beyond going on as before must be worth the calm price too
        now = outlook.of(outlook.cost, np.where(view.place == NEVER_RAN, view.rungs.full, view.place))
        worth = (worth.T - self._market.calm_price * np.maximum(outlook.cost.T - now, 0.0)).T
        # equals differ a little, or all would be given up at once
        kept = self._attainment * (0.8 + 0.4 * np.modf(np.abs(view.arrival) * 7919.0)[0])
        return Bids(worth, outlook.ahead, outlook.rest, np.where(view.budgeted, kept, np.inf))

    def _best(
        self,
        outlook: Outlook,
        value: Floats,
        settings: tuple[Setting, ...],
        late: Bools,
        place: Ints,
        waste: Floats,
    ) -> int:
        """The candidate under which those in time are worth most. `place` is SITS_OUT for who is given up; `waste` is what
        short steps lose."""
        counts = outlook.view.budgeted & (place >= 0) & ~late
        worth = np.where(counts, outlook.of(value, np.maximum(place, 0)) + self._attainment, 0.0).sum(1)
        worth -= waste + 1e-6 * np.array([s.surcharge + s.below_full + s.part + s.pause for s in settings])
        return int(worth.argmax())

    @staticmethod
    def _reasons(outlook: Outlook, forecast: Forecast, chosen: int, place: Ints) -> Ints:
        """[n] its own deadline if it would miss that at its ceiling with everything else as it is, else the others'."""
        view = outlook.view
        best = np.where(view.floor == view.ceiling, int(Reason.PINNED), int(Reason.BEST))
        if (place == view.ceiling).all():
            return best
        each = outlook.prices.row[view.ceiling] / outlook.depth[view.ceiling]
        extra = (outlook.of(outlook.work, view.ceiling) - outlook.of(outlook.work, place)) * each
        alone = outlook.prices.alone
        slower = np.maximum(alone[view.ceiling] - alone[place], 0.0) * outlook.left
        own = forecast.last[chosen] + np.maximum(extra, slower) > view.last_due - view.now
        own |= (forecast.first[chosen] + extra > view.first_due - view.now) & (view.num_output == 0)
        reason = np.where(own & view.budgeted, int(Reason.DEADLINE), int(Reason.OTHERS))
        reason = np.where((place == view.place) & (view.tokens_since_switch == 0), int(Reason.HOLD), reason)
        return np.where(place == view.ceiling, best, reason)
