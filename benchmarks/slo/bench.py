"""What all points of a comparison share, measured first; and one point: a policy under a load, on a server of its own."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.provenance import commit
from benchmarks.slo import capacity as measured
from benchmarks.slo import figures, load
from benchmarks.slo.serving import Served, Settings, started
from benchmarks.slo.simulated import Slowness, foretold, replica, slowness
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.simulator.replica_config import ReplicaConfig
from sortserve.engine.simulator.traces import BudgetMix, Trace, Unloaded, read_trace

_SAMPLED = 3000  # requests from the first one on that closed loops draw from: as many as a point of minutes has

_CROWD_PROMPTS, _LONE_PROMPTS, _WARM_UP_PROMPTS, _LOOP_PROMPTS = range(1, 5)
"""Seeds of the prompts of the crowd, of lone requests, of a point's warm-up, and of a sub-model's first closed loop, from
which the next ones count on. Each loop of a server has its own, or the prefix cache would know its prompts."""
_CROWD = 4  # times the clients of a closed loop, before the first


@dataclass(frozen=True)
class Bench:
    """A trace, a model, and how fast that is here."""

    asked: argparse.Namespace
    settings: Settings
    ladder: Ladder
    trace: Trace  # lengths scaled
    sample: Trace  # of its requests: for closed loops
    texts: load.Texts
    unloaded: Unloaded
    capacity: Sequence[measured.Capacity]  # in the ladder's order, the full model last
    slowness: Slowness | None  # of the server against its profile; None: nothing is simulated
    simulated: ReplicaConfig | None  # as slow as the server
    commit: str  # of before anything was written

    @property
    def full(self) -> measured.Capacity:
        """Of the full model."""
        return self.capacity[-1]

    @property
    def floor(self) -> measured.Capacity:
        """Of the smallest sub-model that a request with a budget accepts."""
        floor = self.ladder.entries[self.ladder.default_floor].id
        return next(found for found in self.capacity if found.submodel == floor)

    @property
    def mix(self) -> BudgetMix:
        """How budgets are drawn: `--tightness` scales all of them, `--no-budget` says how many have none."""
        mix, factor = BudgetMix(strict=self.asked.strict), self.asked.tightness
        scaled = ("ttft_base", "ttft_factor", "tpot_factor", "total_base", "total_factor")
        budgeted = (1 - self.asked.no_budget) / (mix.interactive + mix.relaxed)
        shares = {"interactive": mix.interactive * budgeted, "relaxed": mix.relaxed * budgeted}
        return replace(mix, **shares, **{name: getattr(mix, name) * factor for name in scaled})

    def load_of(self, text: str) -> float:
        """A load as the command line has it, as a multiple of the full model's capacity."""
        if text.endswith("f"):
            return float(text[:-1]) * self.floor.requests_per_second / self.full.requests_per_second
        return float(text)


def prepare(asked: argparse.Namespace) -> Bench:
    """Everything that comes before the first point: trace, texts, speeds."""
    flags = [*asked.server_flags.split(), "--kv-memory", asked.kv_memory, "--dtype", asked.dtype]
    flags += ["--ladder", str(asked.ladder)] if asked.ladder else []
    settings = Settings(asked.model, tuple(flags), asked.nice)
    shape = load_model_config(asked.model).shape
    path = asked.ladder or asked.model / "ladder.json"
    ladder = Ladder.load(path, shape) if path.is_file() else Ladder.default(shape)
    ids = [entry.id for entry in ladder.entries]
    rungs = ids if asked.rungs == "all" else [ids[ladder.default_floor], ids[-1]]
    with started(settings, "fixed") as served:
        context = served.get("/v1/models")["data"][0]["max_model_len"]
        trace = load.fitted(read_trace(asked.trace), asked.lengths, context)
        texts = load.Texts(served.tokens_of(load.read_text(asked.text)))
        sample = load.drawn(trace, asked.start, _SAMPLED, seed=4)
        # attention of bfloat16 is compiled for every new length of a chunk: whoever came first would pay for all rungs; and
        # by crowded steps vLLM learns what those of overload take
        crowd = load.pinned_asks(sample.num_prompt, sample.num_output, ids[-1], texts, _CROWD_PROMPTS)
        served.closed_loop(crowd, _CROWD * asked.clients, asked.capacity_seconds)
        unloaded = measured.unloaded(served, sample, ids[-1], texts, asked.capacity_seconds, _LONE_PROMPTS)
        print(
            f"unloaded: first token {1e3 * unloaded.first:.1f} ms + {1e3 * unloaded.prompt_token:.3f} ms per ", end=""
        )
        print(f"prompt token, then {1e3 * unloaded.token:.2f} ms per token", flush=True)
        capacity = [measure(served, sample, rung, texts, asked, seed) for seed, rung in enumerate(rungs, _LOOP_PROMPTS)]
    slow = simulated = None
    if asked.simulated:
        simulated = replica(settings, asked.kv_memory, ladder)
        slow = slowness(simulated, sample, ladder, asked.clients, capacity)
        simulated = slow.applied(simulated)
        print(
            f"simulated with {slow.factor:.2f}x the profile's step times and {1e3 * slow.between:.2f} ms between steps"
        )
    bench = Bench(asked, settings, ladder, trace, sample, texts, unloaded, capacity, slow, simulated, commit())
    ratio = bench.floor.requests_per_second / bench.full.requests_per_second
    print(f"the floor {bench.floor.submodel} does {ratio:.2f}x of the full model's requests")
    return bench


def measure(
    served: Served, sample: Trace, rung: str, texts: load.Texts, asked: argparse.Namespace, seed: int
) -> measured.Capacity:
    """Measure one sub-model, and say so."""
    found = measured.capacity(served, sample, rung, texts, asked.clients, asked.capacity_seconds, seed)
    print(f"capacity of {rung}: {found.requests_per_second:.2f} requests/s, ", end="")
    print(f"{found.output_tokens_per_second:.0f} output tokens/s", flush=True)
    return found


def again(bench: Bench) -> list[measured.Capacity]:
    """The capacity of floor and full model once more: what it was at the start tells loads only if the machine stayed."""
    with started(bench.settings, "fixed") as served:
        ends = (bench.floor.submodel, bench.full.submodel)
        asked, texts = bench.asked, bench.texts
        measured.capacity(served, bench.sample, ends[1], texts, asked.clients, asked.capacity_seconds, _CROWD_PROMPTS)
        return [
            measure(served, bench.sample, rung, texts, asked, seed) for seed, rung in enumerate(ends, _LOOP_PROMPTS)
        ]


def run_point(bench: Bench, policy: str, multiple: float) -> dict[str, Any]:
    """One policy under one load, a multiple of the full model's capacity."""
    asked = bench.asked
    rate = multiple * bench.full.requests_per_second
    trace = load.arrivals(bench.trace, asked.start, rate, asked.seconds)
    work = load.workload(trace, bench.unloaded, asked.seed, bench.mix)
    name, _, submodel = policy.partition(":")  # `fixed:floor` and `fixed:d4` run that sub-model
    only = bench.floor.submodel if submodel == "floor" else submodel
    pinned = ["--fixed-submodel", only] if only else []
    with started(bench.settings, name, *pinned) as served:
        warm_up(served, bench)
        before = served.counters()
        drain = max(asked.drain_seconds, load.latest_due(work) - asked.seconds)
        outcomes = served.open_loop(load.asks(work, bench.texts, asked.seed), drain)
        counted = served.counters()
        counted.subtract(before)
    assert len(outcomes) == len(work), "every request comes back as something"
    kinds, quality_of = work.kind, bench.ladder.mean_quality
    answers = [
        figures.answered(outcome, kinds[outcome.number], load.budget_of(work, outcome.number), quality_of)
        for outcome in sorted(outcomes, key=lambda outcome: outcome.number)
    ]
    simulated = None
    if bench.simulated is not None:
        simulated = foretold(bench.simulated, name, bench.ladder, only, work, asked.seconds)
    return {
        "policy": policy,
        "load": multiple,
        "load_of_floor": rate / bench.floor.requests_per_second,
        "requests_per_second": rate,
        **figures.summary(answers, asked.seconds),
        "counters": {name: count for name, count in sorted(counted.items()) if count},
        "simulated": simulated,
    }


def warm_up(served: Served, bench: Bench) -> None:
    """A second of requests before those that count: connections, first steps, pages."""
    few = slice(0, 2 * bench.asked.clients)
    prompts, outputs = bench.trace.num_prompt[few], bench.trace.num_output[few]
    served.closed_loop(load.pinned_asks(prompts, outputs, bench.floor.submodel, bench.texts, _WARM_UP_PROMPTS), 4, 1.0)
