"""What a sorted training step costs, against an ordinary one: `python -m benchmarks.sorting.training [--model FOLDER]`.

A step is 24 passes, whose gradients add up, and an update. An ordinary pass trains the full model only; a SoFT pass runs the
layers once and the head once per exit; a SortedNet step runs each point of a grid of 24 once. Both kinds are held against
what their matrix products (`pass_flops`) predict from the ordinary passes' time; the update is counted on both sides. All
take turns pass by pass, because these machines' speed drifts by more than what is looked for.
Beside other work, OMP_NUM_THREADS=1 and --cpu-time give figures that it changes little.
Without --model: the architecture of the bundled recipe, full weights. With one: LoRA.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models

from benchmarks.common import median, report
from sortserve.engine.submodel import ModelShape
from sortserve.sorting import data, lora, memory, new_model, recipe, training
from sortserve.sorting.flops import machine_flops, model_shape, pass_flops
from sortserve.sorting.machine import keep_freed_memory
from sortserve.sorting.nested import SubModels
from sortserve.sorting.optimizer import Optimizer
from sortserve.sorting.sampler import Pass, Sampler
from sortserve.sorting.trainer import Parts, run_pass

RECIPES = Path(training.__file__).parent / "recipes"
LIMIT = 1.1
POINTS = 24
EVERY = 4
"""Points between two passes of the other kinds."""


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sorting.training", description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; none: the bundled recipe's architecture")
    parser.add_argument("--tokens", type=int, help="of a pass; default: 4096, with a model 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, instead of wall time")
    asked = parser.parse_args()
    keep_freed_memory()
    tokens = asked.tokens or (512 if asked.model else 4096)
    run(
        "training_lora" if asked.model else "training",
        prepare(asked.model, tokens),
        asked.rounds,
        time.process_time if asked.cpu_time else time.perf_counter,
    )


def prepare(folder: Path | None, tokens: int) -> tuple[Parts, ModelShape, recipe.Recipe]:
    """A model with random tokens to train on."""
    if folder is None:
        given = recipe.read_recipe(RECIPES / "bundled.toml")
        assert given.model is not None
        vocabulary = {str(number): number for number in range(given.model.vocab)}
        model = new_model.make(given, Tokenizer(models.WordLevel(vocabulary, unk_token="0"))).bfloat16().train()
        adapters = None
        exits, widths = given.grid.exits, given.grid.widths
    else:
        model = training.load(folder).bfloat16().train()
        layers, ffn = model.config.num_hidden_layers, model.config.intermediate_size
        exits = [layers * part // 6 for part in range(1, 7)]
        widths = [ffn * part // 4 // 128 * 128 for part in range(1, 4)] + [ffn]
        given = recipe.Recipe(lora=recipe.Lora(rank=16))
        adapters = lora.add_adapters(model, given.lora or recipe.Lora())
    train = recipe.Train(tokens_per_pass=tokens)
    given = recipe.Recipe(recipe.Data(), recipe.Grid(exits, widths), recipe.Method(), train, None, given.lora)
    config = model.config
    sampler = Sampler.make(given.grid, given.method, config.num_hidden_layers, config.intermediate_size, 0)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, 64 * tokens).astype(np.int32)
    packed = data.Packed(ids, given.train.window, 0)
    shape = model_shape(config)
    return Parts(model, sampler, packed, 0, given, Path(), "", Accelerator(), adapters), shape, given


class Kind:
    """Passes of one kind of step, in turn: their times and their matrix products' operations."""

    def __init__(self, parts: Parts, shape: ModelShape, passes: list[Pass]) -> None:
        self.passes = passes
        train, adapters = parts.recipe.train, parts.recipe.lora
        rank = adapters.rank if adapters else 0
        self.flops = [
            pass_flops(
                shape, one.chosen, train.tokens_per_pass, train.window, frozen=adapters is not None, lora_rank=rank
            )
            for one in passes
        ]
        self.seconds: list[list[float]] = [[] for _ in passes]
        self._parts, self._number = parts, 0

    def run(self, optimizer: Optimizer, clock: Callable[[], float]) -> None:
        """The next pass."""
        train, place = self._parts.recipe.train, self._number % len(self.passes)
        windows = self._parts.packed.windows(self._number, train.tokens_per_pass, train.window)
        self._number += 1
        began = clock()
        run_pass(self._parts, self.passes[place], windows.to(self._parts.accelerator.device))
        optimizer.collect()
        self.seconds[place].append(clock() - began)

    @property
    def step_flops(self) -> float:
        """Of a step."""
        return POINTS * sum(self.flops) / len(self.flops)

    @property
    def step_seconds(self) -> float:
        """Of a step's passes: each the median of its times, since a few are twice as long for no reason of theirs."""
        return POINTS * sum(median(times) for times in self.seconds) / len(self.seconds)


def kinds_of(parts: Parts, shape: ModelShape) -> dict[str, Kind]:
    """The three kinds of step."""
    sampler = parts.sampler
    exits, widths = sampler.exits, sampler.widths
    points = [Pass(SubModels((depth,), width), (1.0,)) for depth, width in sampler.grid]
    assert len(points) == POINTS
    return {
        "ordinary": Kind(parts, shape, [Pass(SubModels(exits[-1:], widths[-1]), (1.0,))]),
        "soft": Kind(parts, shape, [Pass(SubModels(exits, widths[-1]), (1 / len(exits),) * len(exits))]),
        "sorted": Kind(parts, shape, points),
    }


def measure(kinds: dict[str, Kind], optimizer: Optimizer, rounds: int, clock: Callable[[], float]) -> float:
    """Every point once a round, after every few of them a pass of each other kind. Returns the seconds of an update."""
    updates = []
    for number in range(rounds + 1):
        for place in range(POINTS):
            kinds["sorted"].run(optimizer, clock)
            if place % EVERY == EVERY - 1:
                kinds["ordinary"].run(optimizer, clock)
                kinds["soft"].run(optimizer, clock)
        began = clock()
        optimizer.step(1e-3, POINTS)
        updates.append(clock() - began)
        if number == 0:  # which warms up
            for kind in kinds.values():
                kind.seconds = [[] for _ in kind.passes]
    return median(updates[1:])


def where_it_goes(kind: Kind, ordinary_rate: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a pass = rest + depth x (layer + share of the width x ffn), by least squares over the grid's points:
    as measured, and if each point took what its FLOPs predict at the ordinary pass's rate."""
    points = [(one.chosen.exits[-1], one.chosen.width) for one in kind.passes]
    widest = max(width for _, width in points)
    terms = np.array([[1, depth, depth * width / widest] for depth, width in points])
    found = {}
    measured = [median(times) for times in kind.seconds]
    for name, seconds in (("measured", measured), ("predicted", [one / ordinary_rate for one in kind.flops])):
        solved = np.linalg.lstsq(terms, 1e3 * np.array(seconds))[0]
        found[name] = {part: round(float(ms), 1) for part, ms in zip(("rest", "layer", "ffn"), solved, strict=True)}
    return found


def run(name: str, prepared: tuple[Parts, ModelShape, recipe.Recipe], rounds: int, clock: Callable[[], float]) -> None:
    """Time passes of the three kinds in turn, and print what steps of them cost."""
    parts, shape, given = prepared
    model, tokens = parts.model, given.train.tokens_per_pass
    optimizer = Optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], given.train)
    rate = machine_flops(torch.bfloat16, parts.accelerator.device, clock=clock)
    print(f"one large bfloat16 product: {rate / 1e9:.0f} GFLOP/s; {tokens} tokens a pass, {POINTS} passes a step")
    kinds = kinds_of(parts, shape)
    update = measure(kinds, optimizer, rounds, clock)
    ordinary_rate = kinds["ordinary"].step_flops / kinds["ordinary"].step_seconds
    figures: dict[str, Any] = {"machine_flops_s": round(rate), "tokens_per_pass": tokens, "clock": clock.__name__}
    figures["update_seconds"] = round(update, 3)
    checks = {}
    for title, kind in kinds.items():
        seconds = kind.step_seconds + update
        ratio = seconds / (kind.step_flops / ordinary_rate + update)
        share, speed = kind.step_flops / seconds / rate, POINTS * tokens / seconds
        figures[title] = {
            "seconds": round(seconds, 3),
            "tokens_s": round(speed),
            "share_of_machine_flops": round(share, 3),
            "of_what_flops_predict": round(ratio, 3),
        }
        print(
            f"{title:9} {seconds:7.2f} s, {speed:6.0f} tokens/s, {share:.0%} of the machine's FLOP rate, "
            f"{ratio:.2f}x of what its FLOPs predict from the ordinary step"
        )
        if title != "ordinary":
            checks[f"{title} step at most {LIMIT}x of what its FLOPs predict"] = ratio <= LIMIT
    figures["sorted_pass_ms"] = where_it_goes(kinds["sorted"], ordinary_rate)
    print(f"a SortedNet pass, rest + depth x (layer + share of width x ffn), ms: {figures['sorted_pass_ms']}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    most = weights + memory.bound(model, parts.sampler, given)
    figures |= {"peak_memory_bytes": peak, "weights_and_step_bound_bytes": most}
    print(f"peak memory of the process {peak / 2**30:.2f} GiB; weights and a step at most {most / 2**30:.2f} GiB")
    report(name, figures, checks)


if __name__ == "__main__":
    main()
