"""One simulated replica: the policies, the order and the filling of the engine's steps, on a virtual clock.

A step is: ask the policy if something happened, fill the step, charge what its shape costs, book what it gave. Steps whose
composition can only repeat (single rows, nobody joins or ends) are charged together; the outcome is the same to the bit.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from sortserve.engine.cost import StepShape, with_signals
from sortserve.engine.cost_model import CostModel
from sortserve.engine.foretelling import Foreteller
from sortserve.engine.policies.protocol import NEVER_RAN, Decision, Policy, Reason, View, wants_confidence
from sortserve.engine.rungs import Floats, Ints
from sortserve.engine.simulator.live import Live
from sortserve.engine.simulator.memory import Memory
from sortserve.engine.simulator.records import Records
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import Workload
from sortserve.engine.step import fill, in_order, shape_of

IDLE_SECONDS = 1e-3
"""When nobody may run (all sit out), the policy is asked again after this."""
NOISE_STEPS = 1 << 12
"""Random numbers drawn per replica; then they come again."""


@dataclass(frozen=True)
class _Step:
    """Who runs. Rows of `live` where not said otherwise."""

    view: View
    place: Ints  # [n] NEVER_RAN or SITS_OUT for who does not run
    reason: Ints  # [n]
    have: Ints  # [n, segments]
    start: Ints  # [n]
    stop: Ints  # [n]
    ran: Ints  # indices
    after: Ints  # [n, segments] tokens computed when it is done
    held_bytes: float  # K/V memory in use then
    repeats: int  # how often at most in a row, at least 1


class Replica:
    """Serves what is submitted to it. `advance` until a time, `submit`, and so on; `records` has what came of it."""

    def __init__(self, config: ReplicaConfig, policy: Policy, workload: Workload, records: Records) -> None:
        self._wants_confidence = wants_confidence(policy)
        if self._wants_confidence:  # asked at each step, and its signals cost something
            config = replace(config, cost=with_signals(config.cost), ask_every=1)
        rungs = config.rungs
        self.now = 0.0
        self.records = records
        self.live = Live(rungs.num_segments, len(rungs.exits))
        self.memory = Memory(rungs, config.kv, int(workload.group.max(initial=-1)) + 1)
        self._config = config
        self._believed = None if config.believed is None else CostModel(config.believed)
        self._policy = policy
        self._workload = workload
        self._decision: Decision | None = None
        self._since_asked = 0
        self._asked_at = 0.0
        self._log = hashlib.blake2b(digest_size=16)
        self._noise = np.exp(config.noise * np.random.default_rng(config.noise_seed).standard_normal(NOISE_STEPS))
        self._confidence = np.random.default_rng(1).random(NOISE_STEPS) ** 0.35
        self._stalls = sorted(config.stalls)
        self._foreteller = Foreteller()
        self._foretold: dict[int, tuple[float, float]] = {}  # by request: when it was, and how many seconds from then
        self._num_steps = 0

    # ---- in

    @property
    def load(self) -> int:
        """Tokens still to compute for all requests here: what routing goes by."""
        live = self.live
        return int((live.num_prompt - live.computed[:, 0]).clip(0).sum() + live.expected_left().sum())

    def submit(self, number: int) -> None:
        """Request `number` of the workload arrives, now or before the next step."""
        live, rungs, workload = self.live, self._config.rungs, self._workload
        if len(live) - int(live.running.sum()) >= self._config.max_waiting:
            self.records.refuse(number, queue_full=True)
            return
        budgeted = bool(workload.budgeted[number])
        expected = max(1, round(int(workload.num_output[number]) * self._config.length_factor))
        floor = rungs.default_floor if budgeted else rungs.full
        keeps = "refill" in self._config.capabilities
        live.add(number, workload, floor=floor, ceiling=rungs.full, expected=expected, resumable=keeps)
        self._decision = None

    # ---- time

    def advance(self, until: float) -> None:
        """Steps until the clock is at `until` or, if a step takes longer, past it."""
        while self.now < until:
            if not len(self.live):
                self.now = until if until < np.inf else self.now
                return
            while self._stalls and self.now >= self._stalls[0][0]:
                self.now += self._stalls.pop(0)[1]
            step = self._compose()
            if step is None:
                self.now = min(self.now + IDLE_SECONDS, until) if len(self.live) else self.now
                continue
            self._run(step, until)

    def digest(self) -> str:
        """A hash of every step so far: its end, who ran in it, on which sub-model, how far."""
        return self._log.hexdigest()

    # ---- one step

    def _view(self) -> View:
        live, config = self.live, self._config
        self.memory.look_up(live)
        last_due, next_due = live.dues()
        if config.patience < np.inf:
            next_due = np.where(live.budgeted, next_due, live.arrival + config.patience)
        return View(
            now=self.now,
            rungs=config.rungs,
            cost=self._believed or config.cost,
            step_tokens=config.step_tokens,
            max_running=config.max_running,
            capabilities=config.capabilities,
            arrival=live.arrival,
            running=live.running,
            place=live.place,
            floor=live.floor,
            ceiling=live.ceiling,
            num_prompt=live.num_prompt,
            num_output=live.num_output,
            expected_left=live.expected_left(),
            computed=live.computed,
            cached=live.cached,
            resumable=live.resumable,
            exact=live.exact,
            strict=live.strict,
            budgeted=live.budgeted,
            first_due=live.ttft_due,
            last_due=last_due,
            next_due=next_due,
            tokens_since_switch=live.num_output - live.switched_at,
            confidence=live.confidence,
            starts=self._foreteller.traffic.rate(self.now),
            start_rows=self._foreteller.traffic.rows,
        )

    def _compose(self) -> _Step | None:
        """The next step, or None if nobody runs. Asks the policy where something happened since it was asked last."""
        view = self._view()
        waited = self._since_asked >= self._config.ask_every or self.now >= self._asked_at + self._config.ask_seconds
        if self._decision is None or waited:
            self._decision = self._policy.decide(view)
            self._since_asked, self._asked_at = 0, self.now
            if self._refuse(view, self._decision):
                view = self._view()
                if not len(self.live):
                    return None
        decision = self._decision
        place, reason = decision.place, decision.reason
        for _ in range(8):
            have, start, stop = fill(view, place, decision.chunk_tokens)
            after = self._after(place, have, start, stop)
            held_bytes = self.memory.in_use(self.live, after)
            if held_bytes <= self._config.kv.capacity:
                break
            short = held_bytes - self._config.kv.capacity
            place, reason = self._make_room(view, place, reason, start, short)
            self.records.memory_short += 1
            view = self._view()
        else:
            stop = np.where(self.live.running, stop, start)  # whoever runs goes on; nobody else starts
            after = self._after(place, have, start, stop)
            held_bytes = self.memory.in_use(self.live, after)
        ran = np.flatnonzero(stop > start)
        if not len(ran):
            self._decision = None
            return None
        repeats = self._repeats(place, start, stop, ran, self._config.kv.capacity - held_bytes)
        return _Step(view, place, reason, have, start, stop, ran, after, held_bytes, repeats)

    def _refuse(self, view: View, decision: Decision) -> bool:
        """End who is refused; whether there were any. The decision goes on without them."""
        if not decision.refuse.any():
            return False
        assert not (decision.refuse & ~(view.strict & (view.place == NEVER_RAN))).any(), "a policy refused who may stay"
        for number in self.live.id[decision.refuse].tolist():
            self.records.refuse(number, queue_full=False)
        stays = ~decision.refuse
        self.live.keep(stays)
        self._decision = Decision(
            decision.place[stays], decision.reason[stays], decision.refuse[stays], decision.chunk_tokens
        )
        return True

    def _after(self, place: Ints, have: Ints, start: Ints, stop: Ints) -> Ints:
        """[n, segments] tokens computed once the step is done."""
        live, rungs = self.live, self._config.rungs
        ran = stop > start
        runs = rungs.runs.T.take(np.maximum(place, 0), axis=1)  # [segments, n]
        after = np.where(ran & runs, np.maximum(have.T, stop), live.computed.T)
        moved = live.exact & (live.place >= 0) & (place != live.place) & ran
        if moved.any():  # other widths below: what lies above them is worth nothing any more
            lost = moved & (np.where(runs, live.computed.T, 0) > have.T).any(axis=0)
            after[lost & ~runs] = 0
        return after.T

    def _make_room(self, view: View, place: Ints, reason: Ints, start: Ints, short: float) -> tuple[Ints, Ints]:
        """Who rises stays where it is; then memory is taken back from the back of the order."""
        live = self.live
        rises = (place > live.place) & (live.place >= 0)
        fresh = (live.place == NEVER_RAN) & (place > live.floor)
        lower = np.where(rises, live.place, np.where(fresh, live.floor, place))
        if not rises.any():
            to_floor = self.memory.reclaim(live, in_order(view, np.maximum(place, 0), start), short)
            lower = np.where(to_floor & (place >= 0), live.floor, lower)
        return lower, np.where(lower != place, int(Reason.MEMORY), reason)

    def _repeats(self, place: Ints, start: Ints, stop: Ints, ran: Ints, room: float) -> int:
        """How many steps in a row must have this composition: only single rows run, all of which give a token, and
        nobody else could."""
        live, config = self.live, self._config
        if not config.repeat:
            return 1
        known = live.known
        if (stop[ran] - start[ran] > 1).any() or (stop[ran] != known[ran]).any() or not live.running[ran].all():
            return 1
        if (place[ran] != live.place[ran]).any() or (live.computed[ran, 0] != known[ran] - 1).any():
            return 1
        others = (stop <= start) & (place >= 0)
        if others.any() and (live.running[others].any() or live.running.sum() < config.max_running):
            return 1
        left = int((live.target[ran] - live.num_output[ran]).min())
        most = max(1, min(config.ask_every - self._since_asked, left))
        page = len(ran) * (self.memory.sizes.token_layer * int(config.rungs.layers.sum()) + self.memory.sizes.state)
        return most if room > page * (most + 16) else 1

    def _run(self, step: _Step, until: float) -> None:
        """Charge and book the step, as often as it repeats without an arrival in between."""
        shape = shape_of(step.view, step.place, step.have, step.start, step.stop)
        count = step.repeats
        first = shape
        if count > 1:
            shape = _repeated(shape, count, self._config.rungs.exits[step.place[step.ran]])
        seconds = np.atleast_1d(self._config.cost.seconds(shape))
        at = np.arange(self._num_steps, self._num_steps + count) % NOISE_STEPS
        seconds = seconds * self._noise[at]
        if self._believed is not None:  # repeated steps count as one
            self._believed.observe(first, float(seconds[0]))
        seconds[0] += self.now
        ends = np.cumsum(seconds)
        stalls = self._stalls[0][0] if self._stalls else np.inf
        event = min(until, stalls, self._asked_at + self._config.ask_seconds)
        count = min(count, int(np.searchsorted(ends, event)) + 1)
        self._num_steps += count
        self.now = float(ends[count - 1])
        self._since_asked += count
        self._log.update(ends[:count].tobytes())
        self._log.update(self.live.id[step.ran].tobytes() + step.place[step.ran].tobytes())
        self._log.update(step.stop[step.ran].tobytes())
        self.records.step(shape.kind, ends[:count], len(step.ran), step.held_bytes)
        self._book(step, ends[:count], decode=shape.kind == "decode")

    def _book(self, step: _Step, ends: Floats, *, decode: bool) -> None:
        live, ran, count = self.live, step.ran, len(ends)
        place, stop = step.place[ran], step.stop[ran]
        self._note_places(step)
        refills = ran[step.have[ran, 0] > step.start[ran]]
        if len(refills):
            live.refilled[refills] += np.minimum(step.stop, step.have[:, 0])[refills] - step.start[refills]
        after = step.after
        if count > 1:
            after[ran] += np.where(self._config.rungs.runs[place], count - 1, 0)
        live.computed[:] = after
        live.running[ran] = True
        live.place[ran] = place
        if "refill" in self._config.capabilities:
            lacks = ran[~live.resumable[ran]]
            full_again = after[lacks, 0] == after[lacks, self._config.rungs.exits[live.ceiling[lacks]] - 1]
            live.resumable[lacks] = full_again
        self.memory.publish(live, ran)
        sampled = ran[stop == live.known[ran]]
        fresh = sampled[live.num_output[sampled] == 0]
        live.first_token[fresh] = ends[0]
        live.last_token[sampled] = ends[-1]
        live.num_output[sampled] += count
        live.made[sampled, live.place[sampled]] += count
        if self._wants_confidence:
            at = (live.id[sampled] * 7919 + live.num_output[sampled]) % len(self._confidence)
            live.confidence[sampled] = self._confidence[at]
        done = np.zeros(len(live), np.bool_)
        done[sampled] = live.num_output[sampled] >= live.target[sampled]
        if done.any():
            self.records.finish(live, np.flatnonzero(done), self._config.rungs.quality)
            for number in live.id[done].tolist() if self._foretold else ():
                began, seconds = self._foretold.pop(number)
                self._foreteller.ended(seconds, self.now - began)
            live.keep(~done)
        if done.any() or not decode:
            self._decision = None

    def _predict(self, step: _Step, new: Ints) -> None:
        view = step.view
        assert self._decision is not None
        last = self._foreteller.foretell(view, step.place, self._decision.chunk_tokens)[1][new]
        number, waited = self.live.id[new], view.now - view.arrival[new]
        self._foretold.update(zip(number.tolist(), zip([view.now] * len(new), last.tolist(), strict=True), strict=True))
        last = last * self._foreteller.factor
        self.records.predicted[number] = waited + last
        self.records.predicted_p90[number] = waited + last * self._foreteller.spread

    def _note_places(self, step: _Step) -> None:
        """Count changes of sub-model with their reasons; take over what the prefix cache has."""
        live, ran = self.live, step.ran
        place = step.place[ran]
        fresh = live.place[ran] == NEVER_RAN
        new = ran[fresh]
        live.adopted[new] = live.cached[new, place[fresh]]
        if self._config.predicts and len(new):
            self._predict(step, new)
        for rows in (live.num_prompt[new] - live.adopted[new]).tolist():
            self._foreteller.traffic.note(step.view.now, rows)
        changed = ~fresh & (place != live.place[ran])
        if not changed.any():
            return
        who = ran[changed]
        live.switches[who] += 1
        live.switched_at[who] = live.num_output[who]
        live.uniform[who] = False
        up = place[changed] > live.place[who]
        self.records.switch(step.reason[who], up)


def _repeated(shape: StepShape, count: int, exits: Ints) -> StepShape:
    """The shapes of `count` steps in a row, [count, ...]: every row's context grows by one a step."""
    growing = (np.arange(len(shape.rows)) < exits[:, None]).sum(axis=0)  # [segments] rows that run there

    def same(term: Floats) -> Floats:
        return np.broadcast_to(term, (count, *term.shape))

    return replace(
        shape,
        rows=same(shape.rows),
        share=same(shape.share),
        widest=same(shape.widest),
        context=shape.context + np.arange(count)[:, None] * growing,
        pairs=same(shape.pairs),
        sampled=same(shape.sampled),
    )
