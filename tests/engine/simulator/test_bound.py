"""The bound is one: above whatever was tried, equal to what can be worked out by hand, and not idle."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sortserve.engine.cost import StepShape
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import NEVER_RAN, SITS_OUT, Decision, Policy, View
from sortserve.engine.simulator.bound import Rates, best, least_rates, least_work, subtrees
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.simulation import simulate
from sortserve.engine.simulator.traces import Workload
from tests.engine.simulator.little import RandomPolicy, little_config, little_workload, table

pytest.importorskip("scipy")


def _bound(config: ReplicaConfig, workload: Workload, replicas: int = 1, bucket: float = 0.02) -> tuple[float, float]:
    found = best(
        workload,
        config.rungs,
        table(config),
        step_tokens=config.step_tokens,
        max_running=config.max_running,
        replicas=replicas,
        bucket=bucket,
    )
    return found.goodput, found.met


def _rates(config: ReplicaConfig, workload: Workload) -> Rates:
    return least_rates(workload, config.rungs, table(config), config.step_tokens, config.max_running)


class _Scripted:
    """Follows a script: at each question the next choice for each request (by arrival), or -2 to refuse it."""

    name = "scripted"

    def __init__(self, script: Sequence[tuple[int, ...]]) -> None:
        self._script = script
        self._asked = 0

    def decide(self, view: View) -> Decision:
        choices = self._script[min(self._asked, len(self._script) - 1)]
        self._asked += 1
        rank = np.searchsorted(np.array([0.0, 0.001]), view.arrival, side="right") - 1
        chosen = np.array(choices)[rank]
        refuse = (chosen == -2) & view.strict & (view.place == NEVER_RAN)
        place = np.where(chosen < 0, SITS_OUT, np.clip(chosen, view.floor, view.ceiling))
        return Decision(place, np.zeros(len(view), np.int64), refuse, view.step_tokens)


def test_no_schedule_at_all_beats_it_on_tiny_cases() -> None:
    """All ways to give two requests of two or three tokens one of two rungs, a pause or a refusal at each of two
    questions, and one of them for the rest; budgets are so tight that not everything can be had."""
    config = little_config(ask_every=1)
    rungs = replace(config.rungs, default_floor=1)
    config = replace(config, rungs=rungs)
    binding = 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        never = np.full(2, np.inf)
        workload = Workload(
            np.array([0.0, 0.001]),
            rng.integers(4, 40, 2),
            rng.integers(1, 3, 2),
            never,
            never,
            rng.uniform(0.012, 0.04, 2),
            np.ones(2, np.bool_),
            np.full(2, -1, np.int64),
            np.zeros(2, np.int64),
        )
        goodput, met = _bound(config, workload, bucket=0.002)
        pairs = list(itertools.product((1, 3, -1, -2), repeat=2))
        later = list(itertools.product((1, 3, -1), repeat=2))
        reached_goodput = reached_met = 0.0
        for script in itertools.product(pairs, later, [(1, 1), (3, 3)]):
            records = simulate(config, partial(_Scripted, script), workload).records
            reached_goodput = max(reached_goodput, float(records.quality[records.met].sum()))
            reached_met = max(reached_met, float(records.met.sum()))
        assert reached_goodput <= goodput + 1e-6
        assert reached_met <= met + 1e-6
        binding += goodput < 2 - 1e-6
    assert binding, "every budget could be kept at full quality: the bound says nothing"


@pytest.mark.parametrize("replicas", [1, 2])
def test_nothing_that_runs_beats_it(replicas: int) -> None:
    """Random and fixed policies on random workloads, budgets from hopeless to easy, with and without widths."""
    ratios = []
    for seed in range(10):
        widths = (64,) if seed % 2 else (32, 64)
        config = little_config(widths)
        workload = little_workload(40, seed, rate=(10.0, 30.0, 100.0)[seed % 3], factor=(0.7, 1.5)[seed % 2])
        goodput, met = _bound(config, workload, replicas)
        floor, full = config.rungs.default_floor, config.rungs.full
        policies: tuple[Callable[[], Policy], ...] = (
            partial(FixedPolicy, floor),
            partial(FixedPolicy, full),
            partial(RandomPolicy, seed),
        )
        for make in policies:
            records = simulate(config, make, workload, replicas).records
            assert records.quality[records.met].sum() <= goodput + 1e-6
            assert records.met.sum() <= met + 1e-6
            ratios.append(float(records.quality[records.met].sum()) / goodput)
    assert max(ratios) > 0.8, "the bound is far above everything"


def test_full_quality_where_there_is_time_and_nothing_where_there_is_none() -> None:
    config = little_config()
    easy = little_workload(30, 2, rate=5.0, factor=20.0)
    count = int(easy.budgeted.sum())
    goodput, met = _bound(config, easy, bucket=0.5)
    assert goodput == pytest.approx(count)
    assert met == pytest.approx(count)
    hopeless = replace(easy, ttft=easy.ttft * 1e-6, total=easy.total * 1e-6)
    assert _bound(config, hopeless, bucket=0.001)[0] < 0.1 * count


def test_at_twice_what_the_full_model_can_the_mix_is_the_best_by_hand() -> None:
    """Equal requests with one window: the bound is the knapsack of quality over work, two neighbouring rungs mixed."""
    config = little_config()
    count = 50
    never = np.full(count, np.inf)
    workload = Workload(
        np.zeros(count), np.full(count, 32), np.full(count, 1), never, never, np.full(count, 1.0),
        np.ones(count, np.bool_), np.full(count, -1, np.int64), np.zeros(count, np.int64),
    )  # fmt: skip
    places = np.arange(config.rungs.default_floor, config.rungs.full + 1)
    work = least_work(workload, config.rungs, _rates(config, workload), places)
    each = (work.prompt + work.rest)[0]
    quality = config.rungs.quality[places]
    available = count * each[-1] / 2
    mixed = max(
        count * (quality[low] * (1 - t) + quality[high] * t)
        for low, high in itertools.combinations(range(len(places)), 2)
        if 0 <= (t := (available / count - each[low]) / (each[high] - each[low])) <= 1
    )
    alone = max(quality * np.minimum(available / each, count))  # one rung, the rest refused
    within = replace(workload, total=np.full(count, available))
    goodput, met = _bound(config, within, bucket=available * 1.0000001)
    assert goodput == pytest.approx(max(mixed, alone), rel=1e-3)
    floor = least_work(workload, config.rungs, _rates(config, workload), places[:1])
    assert met == pytest.approx(min(count, available / float((floor.prompt + floor.rest)[0, 0])), rel=1e-3)


def test_requests_without_a_budget_take_their_work_by_the_time_patience_ends() -> None:
    config = little_config()
    workload = little_workload(60, 5, rate=200.0)
    bound = partial(best, workload, config.rungs, table(config), step_tokens=32, max_running=8, bucket=0.05)
    free = bound().goodput
    charged = bound(patience=0.5).goodput
    hopeless = bound(patience=0.01).goodput
    assert charged < free - 0.1
    assert hopeless == pytest.approx(free), "what nobody can do is not asked for"


def test_windows_are_whole_subtrees() -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 60, 200)
    stop = start + rng.integers(1, 5, 200)
    owners, nodes = subtrees(start, stop, 64)
    for job in range(200):
        leaves: list[int] = []
        for node in nodes[owners == job].tolist():
            low = high = node
            while low < 64:
                low, high = 2 * low, 2 * high + 1
            leaves += range(low - 64, high - 63)
        assert sorted(leaves) == list(range(start[job], stop[job]))


def test_what_is_charged_is_never_more_than_the_work_of_who_goes_down_on_the_way() -> None:
    """The cheapest way to make the first k tokens deep and the others on the floor: the prompt deep, then k - 1 deep rows
    with the shortest contexts. Work by hand at the best rates, against the shares k / n and 1 - k / n."""
    config = little_config()
    cost, layers = table(config), config.rungs.layers
    gap, slope = 0.5e-3 - 0.5e-3 / 31, 0.5e-3 / 31  # of a layer: 0.5 ms at 1 row, 1 at 32
    never = np.full(1, np.inf)
    prompt, outputs = 7, 60
    workload = Workload(
        np.zeros(1), np.array([prompt]), np.array([outputs]), never, never, np.full(1, 1.0),
        np.ones(1, np.bool_), np.full(1, -1, np.int64), np.zeros(1, np.int64),
    )  # fmt: skip
    places = np.array([1, 3])  # 3 and 6 layers
    work = least_work(workload, config.rungs, _rates(config, workload), places)
    row = slope + float(cost.ffn[1] / 32)  # an FFN is shared by 32; at 192 rows, beyond the table, it costs the same
    contexts = cost.context_seconds * (prompt + np.arange(1, outputs))
    least = 0.0
    for deep in range(outputs + 1):
        share = np.array([1 - deep / outputs, deep / outputs])
        charged_prompt, charged_rest = float(work.prompt[0] @ share), float(work.rest[0] @ share)
        depth = int(layers.sum()) if deep else 3
        true_prompt = depth * (prompt * row + prompt * cost.context_seconds + prompt**2 / 2 * cost.pair_seconds)
        below = 3 * ((outputs - 1) * row + contexts.sum())
        above = 3 * (max(deep - 1, 0) * row + contexts[: max(deep - 1, 0)].sum())
        steps = outputs * (cost.base + 3 * gap) + deep * 3 * gap  # that many at least, with 8 tokens each
        logits = outputs * (1e-4 + 1e-4 * 7 / 31) / 8
        true_rest = below + above + steps / 8 + logits
        assert charged_prompt <= true_prompt * (1 + 1e-9)
        assert charged_rest <= true_rest * (1 + 1e-9)
        least = max(least, charged_rest / true_rest)
    assert least > 0.95, "what is charged is far below the truth everywhere"


def test_no_step_takes_less_than_what_its_rows_and_tokens_are_charged() -> None:
    """Steps of all kinds that a replica ran under random policies: rows, K/V, logits and parts of the step at the least
    rates, of both ways to charge, never come to more than the step took; and not to much less for full steps."""
    for widths in ((64,), (32, 64)):
        config = little_config(widths)
        rungs, cost, places = config.rungs, table(config), len(config.rungs.exits)
        rng = np.random.default_rng(0)
        four = little_workload(4, 0)
        ways = [
            _rates(config, replace(four, num_prompt=np.full(4, prompt), num_output=np.full(4, outputs)))
            for prompt, outputs in ((500, 1), (1, 500))
        ]
        assert ways[0].token.max() == 0 < ways[1].token.min()
        nearest = [0.0, 0.0]
        for _ in range(2000):
            alone = rng.random() < 0.5  # all on one place
            where = np.eye(places)[rng.integers(places)] if alone else np.full(places, 1 / places)
            sampled = rng.multinomial(rng.integers(0, config.max_running + 1), where)
            left = config.step_tokens * rungs.num_layers - int(sampled @ rungs.depths)
            more = np.zeros(places, np.int64)
            place = int(where.argmax())
            more[place] = rng.integers(0, left // rungs.depths[place] + 1)
            count = (sampled + more).astype(np.float64)
            shape = StepShape(
                count @ rungs.runs,
                count @ rungs.share,
                np.where(count[:, None] > 0, rungs.share, 0.0).max(0),
                np.zeros(rungs.num_segments),
                np.zeros(rungs.num_segments),
                np.asarray(float(sampled.sum())),
            )
            took = float(cost.seconds(shape))
            for way, rates in enumerate(ways):
                rows = float(count @ rungs.depths) * rates.layer + float((count @ rungs.share).sum()) * rates.ffn
                charged = rows + float(sampled @ (rates.head + rates.token))
                assert charged <= took * (1 + 1e-9)
                nearest[way] = max(nearest[way], charged / took)
        assert min(nearest) > 0.99, "what is charged is far below every step"
