"""K/V memory of one replica by counting: blocks of 16 tokens per segment, exit states, shared system prompts.

When memory is short it is taken back in the engine's order (`reclaim.py`), from those that come last in the order of the
step: exit states, deep K/V of who may run at its floor, whole requests.
"""

from dataclasses import dataclass

import numpy as np

from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.rungs import Bools, Floats, Ints, Rungs
from sortserve.engine.simulator.live import Live

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class KVSizes:
    """Bytes. `capacity` is what a replica has for K/V and exit states."""

    token_layer: int  # K and V of one token in one layer
    state: int  # one exit state
    capacity: float


def blocks(tokens: Ints) -> Ints:
    """Tokens rounded up to whole blocks."""
    rounded: Ints = (tokens + (BLOCK_TOKENS - 1)) & -BLOCK_TOKENS  # a power of two; division takes ten times as long
    return rounded


class Memory:
    """What requests hold, and what the prefix cache holds for them."""

    def __init__(self, rungs: Rungs, sizes: KVSizes, num_groups: int) -> None:
        self.sizes = sizes
        self._rungs = rungs
        self._segment_bytes = rungs.layers * sizes.token_layer  # [segments] of one token
        places, segments = rungs.settings.shape
        equal = rungs.settings[:, None, :] == rungs.settings[None, :, :]
        both = rungs.runs[:, None, :] & rungs.runs[None, :, :]
        # [places, places, segments] whether two places compute the same K/V up to and in the segment
        self._same = np.logical_and.accumulate(equal, axis=2) & both
        self._prefix = np.zeros((num_groups, places, segments), np.int64)  # tokens cached of what the place computes

    def held_bytes(self, live: Live, computed: Ints, depth_tokens: Ints) -> Floats:
        """[n] bytes with `computed` [n, segments] tokens; `depth_tokens` [n] of them lack K/V in some deeper segment,
        so that their exit states are kept."""
        own = np.maximum(blocks(computed) - live.adopted[:, None], 0)
        states = np.where(live.resumable & (live.floor < live.ceiling), depth_tokens, 0)
        total: Floats = (own @ self._segment_bytes + states * self.sizes.state).astype(np.float64)
        return total

    def shallow_tokens(self, live: Live, computed: Ints) -> Ints:
        """[n] tokens that are not at the request's ceiling yet."""
        deepest = self._rungs.exits[live.ceiling] - 1
        shallow: Ints = computed[:, 0] - computed[np.arange(len(computed)), deepest]
        return shallow

    def in_use(self, live: Live, computed: Ints | None = None) -> float:
        """Bytes held by all, with what they have computed, or would have."""
        computed = live.computed if computed is None else computed
        # the sum of `held_bytes` in whole numbers, without a sum for each request
        own = np.maximum(blocks(computed.T) - live.adopted, 0).sum(1) @ self._segment_bytes
        keeps = np.flatnonzero(live.resumable & (live.floor < live.ceiling))
        deepest = computed[keeps, self._rungs.exits[live.ceiling[keeps]] - 1]
        states = (computed[keeps, 0] - deepest).sum() * self.sizes.state
        return float(own + states) + self.cached_bytes()

    def cached_bytes(self) -> float:
        """Bytes of the shared system prompts, each settings once."""
        if not len(self._prefix):
            return 0.0
        return float((blocks(self._prefix).max(axis=1) @ self._segment_bytes).sum())

    # ---- the prefix cache

    def look_up(self, live: Live) -> None:
        """Fill `live.cached` for those that have not run: whole blocks of their system prompt, per place."""
        if not len(self._prefix):
            return
        fresh = np.flatnonzero((live.place == NEVER_RAN) & (live.group >= 0))
        if not len(fresh):
            return
        there = np.where(self._rungs.runs, self._prefix, np.iinfo(np.int64).max).min(axis=2)  # [groups, places]
        most = np.minimum(live.shared[fresh], live.num_prompt[fresh] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        live.cached[fresh] = np.minimum(there[live.group[fresh]], most[:, None])

    def publish(self, live: Live, ran: Ints) -> None:
        """Those of the rows `ran` that computed their system prompt with one sub-model share it."""
        if not len(self._prefix):
            return
        for i in ran[(live.group[ran] >= 0) & live.uniform[ran]].tolist():
            whole = min(int(live.shared[i]), int(live.computed[i, 0])) // BLOCK_TOKENS * BLOCK_TOKENS
            tokens = np.minimum(live.computed[i], whole)
            mine = np.where(self._same[live.place[i]], tokens, 0)  # [places, segments]
            np.maximum(self._prefix[live.group[i]], mine, out=self._prefix[live.group[i]])

    # ---- taking it back

    def reclaim(self, live: Live, order: Ints, short: float) -> Bools:
        """Take back at least `short` bytes if there are, from the back of `order`; returns [n] who must run at its floor."""
        to_floor = np.zeros(len(live), np.bool_)
        backwards = order[::-1]
        freed = 0.0
        states = self.shallow_tokens(live, live.computed) * self.sizes.state
        for i in backwards[(live.resumable & (states > 0) & (live.floor < live.ceiling))[backwards]].tolist():
            if freed >= short:
                return to_floor
            live.resumable[i] = False
            freed += float(states[i])
        depth = self._rungs.exits[live.floor]
        deep = np.where(np.arange(live.computed.shape[1]) >= depth[:, None], live.computed, 0)
        deep_bytes = blocks(deep) @ self._segment_bytes
        for i in backwards[(live.running & (deep_bytes > 0))[backwards]].tolist():
            if freed >= short:
                return to_floor
            live.computed[i, depth[i] :] = 0
            live.resumable[i] = False
            to_floor[i] = True
            freed += float(deep_bytes[i])
        whole = self.held_bytes(live, live.computed, np.zeros(len(live), np.int64))
        for i in backwards[live.running[backwards]][:-1].tolist():  # the first one always goes on
            if freed >= short:
                break
            live.computed[i] = 0
            live.running[i] = False
            live.adopted[i] = 0
            live.preempted[i] += 1
            freed += float(whole[i])
        return to_floor
