"""`python -m benchmarks.confidence --text FILE`: what the policy `confidence` gains over fixed depths, on the real engine.

The engine reads held-out text: whatever it draws, the text's next token is put in its place, so that every policy sees the
same tokens. A token agrees if the likeliest one at its exit is the full model's. Prompts run in one first step, which is
not counted; everything after is: layers of all rows, refills among them, and the time of the steps, measured with the
signals read where they are wanted, and by the cost table fitted on this machine. Held against mixing the two fixed
sub-models around the same cost. `known` is what no signal can reach: the exit that the next token needs, told beforehand.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.common import report
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.plan import Plan, SequenceResult, StepResult
from sortserve.engine.policies.protocol import Policy
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.protocol import GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import Tokenizer
from sortserve.server.cli import BUNDLED

PROMPT, ANSWER = 32, 128  # tokens
MAXIMUM = (0.01, 0.1, 0.3, 0.5, 0.7)
Q_EXIT = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FORCED = 100.0  # logit bias: above any difference of logits


@dataclass
class Reading:
    """What reading all passages once came to; lists by passage and output token."""

    best: dict[str, list[int]] = field(default_factory=dict)  # likeliest token at the exit
    loss: dict[str, list[float]] = field(default_factory=dict)  # nats of the text's own token
    depth: dict[str, list[int]] = field(default_factory=dict)  # layers that it was drawn after
    tokens: int = 0
    layers: float = 0.0  # rows x layers, refills among them
    seconds: float = 0.0
    table_seconds: float = 0.0


class Forcing:
    """A runner that draws the text's tokens, and notes what it would have drawn."""

    def __init__(self, engine: Engine, passages: Mapping[str, Sequence[int]]) -> None:
        self._engine, self._runner, self._passages = engine, engine.runner, passages
        self.reading = Reading()
        self.needed: Mapping[str, Sequence[int]] = {}  # exit, from 0, by output token: to be told instead of the head

    def run(self, plan: Plan) -> StepResult:
        """One step of the real runner on a plan whose tokens are forced."""
        forced = msgspec.structs.replace(plan, sequences=tuple(map(self._forced, plan.sequences)))
        result = self._runner.run(forced)
        self._count(plan, result.seconds)
        given = [
            self._note(part.request_id, part.exit, own)
            for part, own in zip(plan.sequences, result.sequences, strict=True)
        ]
        return StepResult(tuple(given), result.seconds)

    def _forced(self, part: Any) -> Any:
        if part.sample is None:
            return part
        token = self._passages[part.request_id][part.sample.position]
        params = SamplingParams(part.sample.params.max_tokens, 0.0, logit_bias={token: FORCED}, logprobs=1)
        return msgspec.structs.replace(part, sample=msgspec.structs.replace(part.sample, params=params))

    def _note(self, request_id: str, exit: int, result: SequenceResult) -> SequenceResult:
        if result.token is None:
            return result
        name, reading = request_id, self.reading
        assert result.logprob is not None
        place = len(reading.best.setdefault(name, []))
        assert result.token == self._passages[name][PROMPT + place], "the bias was not enough"
        reading.best[name].append(result.logprob.top[0][0])
        reading.loss.setdefault(name, []).append(-result.logprob.logprob)
        reading.depth.setdefault(name, []).append(self._engine.info.ladder.exits[exit - 1])
        if name in self.needed and place + 1 < len(self.needed[name]):
            exits = np.arange(self._engine.info.ladder.num_segments)
            told = tuple((exits >= self.needed[name][place + 1]).astype(float).tolist())
            result = msgspec.structs.replace(result, within=told)
        return result

    def _count(self, plan: Plan, seconds: float) -> None:
        if any(part.start == 0 for part in plan.sequences):
            return  # the prompts
        rungs, cost = self._engine.scheduler.rungs, self._engine.cost
        shape = shape_of_parts(rungs, plan.sequences)
        assert cost is not None
        self.reading.tokens += len(plan.sequences)
        self.reading.layers += float(shape.rows @ rungs.layers)
        self.reading.seconds += seconds
        self.reading.table_seconds += float(cost.table.seconds(shape))  # as fitted: corrections follow the machine


def read(
    engine: Engine,
    passages: Mapping[str, Sequence[int]],
    policy: Policy,
    batch: int,
    floor: str,
    needed: Mapping[str, Sequence[int]] | None = None,
) -> Reading:
    """All passages, `batch` at a time, under a policy."""
    forcing = Forcing(engine, passages)
    forcing.needed = needed or {}
    engine = replace(engine, runner=forcing)
    engine.scheduler.policy = policy
    names = list(passages)
    for start in range(0, len(names), batch):
        for name in names[start : start + batch]:
            params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
            prompt = tuple(passages[name][:PROMPT])
            engine.scheduler.add(
                GenerateRequest(name, prompt, params, time.monotonic(), None, "auto", floor, None, "reuse")
            )
        while engine.scheduler.requests:
            engine.step()
    return forcing.reading


def passages_of(path: Path, tokenizer: Tokenizer, count: int) -> dict[str, list[int]]:
    """`count` passages long enough, from lines with `text`, drawn with a seed."""
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    tokens = [tokenizer.encode(row)[: PROMPT + ANSWER] for row in rows]
    return {
        f"p{number}": ids for number, ids in enumerate(t for t in tokens if len(t) == PROMPT + ANSWER) if number < count
    }


def figures_of(reading: Reading, full: Reading) -> dict[str, float]:
    """Means a token. `full` read the same passages, or more."""
    names = list(reading.best)
    agreed = [own == best for name in names for own, best in zip(reading.best[name], full.best[name], strict=True)]
    loss, loss_full = (np.mean([each.loss[name] for name in names]) for each in (reading, full))
    return {
        "agreement": float(np.mean(agreed)),
        "quality": float(np.exp(loss_full - loss)),
        "depth": float(np.mean([reading.depth[name] for name in names])),
        "layers": reading.layers / reading.tokens,
        "ms": 1e3 * reading.seconds / reading.tokens,
        "table_ms": 1e3 * reading.table_seconds / reading.tokens,
    }


def mixed(fixed: Sequence[Mapping[str, float]], cost: str, value: str, at: float) -> float:
    """The best `value` that mixing two fixed sub-models reaches at a cost; below the cheapest one, that one's."""
    points = sorted((each[cost], each[value]) for each in fixed)
    at = max(at, points[0][0])
    reached = [low[1] for low in points if low[0] <= at]
    for low in points:
        reached += [
            low[1] + (high[1] - low[1]) * (at - low[0]) / (high[0] - low[0])
            for high in points
            if low[0] <= at <= high[0] and high[0] > low[0]
        ]
    return max(reached)


def needed_exits(by_exit: Sequence[Reading]) -> dict[str, list[int]]:
    """By passage and output token: the shallowest exit from which on all exits say what the deepest does."""
    found = {}
    for name in by_exit[-1].best:
        agree = np.array([each.best[name] for each in by_exit]) == np.array(by_exit[-1].best[name])
        found[name] = (len(by_exit) - np.cumprod(agree[::-1], axis=0).sum(0)).tolist()
    return found


def main() -> None:
    """Read, compare, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.confidence", description=__doc__)
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help=".jsonl of held-out passages, with `text`")
    add("--model", type=Path, default=BUNDLED, help="with a depth head; default: the bundled one")
    add("--passages", type=int, default=64, help=f"of {PROMPT + ANSWER} tokens; default: 64")
    add("--alone", type=int, default=8, help="of them, read one at a time, too; default: 8")
    args = parser.parse_args()
    config = EngineConfig(
        model_folder=args.model, policy="confidence", max_running=16, max_step_tokens=2048, prefix_cache=False
    )
    engine = Engine.load(config)
    ladder, rungs = engine.info.ladder, engine.scheduler.rungs
    assert ladder.depth_head is not None, "the model has no depth head; `sortserve ladder head` makes one"
    passages = passages_of(args.text, Tokenizer.load(args.model), args.passages)
    few = dict(list(passages.items())[: args.alone])
    lowest, middle = ladder.entries[0].id, ladder.entries[ladder.dearest[ladder.num_segments // 2 - 1]].id
    tried: list[tuple[str, str, dict[str, Any]]] = [
        *((f"fixed {ladder.entries[place].id}", lowest, {"place": place}) for place in ladder.dearest),
        *((f"maximum {at:g}", lowest, {"threshold": at}) for at in MAXIMUM),
        *((f"head q {at:g}", lowest, {"signal": "q-exit", "q": at}) for at in Q_EXIT),
        *((f"maximum {at:g}, from {middle}", middle, {"threshold": at}) for at in MAXIMUM[:3]),
        *((f"head q {at:g}, from {middle}", middle, {"signal": "q-exit", "q": at}) for at in Q_EXIT[1::2]),
        ("known", lowest, {"signal": "q-exit"}),
        (f"known, from {middle}", middle, {"signal": "q-exit"}),
    ]
    everything: dict[str, dict[str, dict[str, float]]] = {}
    for label, texts, batch in (("alone", few, 1), ("sixteen", passages, 16)):
        readings: dict[str, Reading] = {}
        for name, floor, options in tried:
            kind = "fixed" if name.startswith("fixed") else "confidence"
            known = needed_exits(list(readings.values())[: ladder.num_segments]) if name.startswith("known") else None
            readings[name] = read(engine, texts, make_policy(kind, rungs, **options), batch, floor, known)
        full = readings[f"fixed {ladder.entries[ladder.full].id}"]
        rows = {name: figures_of(reading, full) for name, reading in readings.items()}
        fixed = [row for name, row in rows.items() if name.startswith("fixed")]
        for row in rows.values():
            for cost in ("layers", "ms", "table_ms"):
                row[f"gain_{cost}"] = row["agreement"] - mixed(fixed, cost, "agreement", row[cost])
        everything[label] = rows
        _print(label, rows)
    figures = {
        label: {n: {k: round(v, 4) for k, v in row.items()} for n, row in rows.items()}
        for label, rows in everything.items()
    }
    gains = {
        f"{signal}: a point above fixed at equal {cost}, {label}": max(
            row[f"gain_{cost}"] for name, row in rows.items() if name.startswith(signal)
        )
        > 0.01  # 8,192 tokens have a standard error of half of it
        for label, rows in everything.items()
        for signal in ("maximum", "head")
        for cost in ("layers", "ms")
    }
    report("confidence", {"head": msgspec.to_builtins(ladder.depth_head), **figures}, gains)


def _print(label: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = ("agreement", "quality", "depth", "layers", "ms", "table_ms", "gain_layers", "gain_ms", "gain_table_ms")
    print(f"\n{label}\n| policy | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
