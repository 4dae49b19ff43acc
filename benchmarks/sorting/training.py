"""What a sorted training step costs, against an ordinary one: `python -m benchmarks.sorting.training [--model FOLDER]`.

An ordinary step trains the full model only. A SoFT step runs the layers once and the head once per exit; a SortedNet step
runs each point of a grid once (24 of them), on as many batches. Both are held against what their matrix products predict
from the ordinary step's time. Beside other work, OMP_NUM_THREADS=1 and --cpu-time give figures that it changes little.
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

from benchmarks.common import alternate, median, paired_ratio, report
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


class Step:
    """An optimiser step over some passes: its time and its matrix products' operations."""

    def __init__(
        self, parts: Parts, shape: ModelShape, optimizer: Optimizer, passes: list[Pass], clock: Callable[[], float]
    ) -> None:
        self._parts, self._optimizer, self._passes, self._number = parts, optimizer, passes, 0
        self._clock = clock
        train, adapters = parts.recipe.train, parts.recipe.lora
        self.tokens = train.tokens_per_pass * len(passes)
        self.flops = sum(
            pass_flops(
                shape,
                one.chosen,
                train.tokens_per_pass,
                train.window,
                frozen=adapters is not None,
                lora_rank=adapters.rank if adapters else 0,
            )
            for one in passes
        )

    def __call__(self) -> float:
        """Seconds."""
        train = self._parts.recipe.train
        began = self._clock()
        for one in self._passes:
            self._number += 1
            windows = self._parts.packed.windows(self._number, train.tokens_per_pass, train.window)
            run_pass(self._parts, one, windows.to(self._parts.accelerator.device))
            self._optimizer.collect()
        self._optimizer.step(1e-3, len(self._passes))
        return self._clock() - began


def run(name: str, prepared: tuple[Parts, ModelShape, recipe.Recipe], rounds: int, clock: Callable[[], float]) -> None:
    """Time ordinary, SoFT and SortedNet steps in turn, and print what they cost."""
    parts, shape, given = prepared
    sampler, model = parts.sampler, parts.model
    optimizer = Optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], given.train)
    device = parts.accelerator.device
    rate = machine_flops(torch.bfloat16, device, clock=clock)
    full = SubModels(sampler.exits[-1:], sampler.widths[-1])
    soft = SubModels(sampler.exits, sampler.widths[-1])
    points = [Pass(SubModels((depth,), width), (1.0,)) for depth, width in sampler.grid]
    assert len(points) == POINTS
    steps = {
        "ordinary": Step(parts, shape, optimizer, [Pass(full, (1.0,))], clock),
        "soft": Step(parts, shape, optimizer, [Pass(soft, (1 / len(sampler.exits),) * len(sampler.exits))], clock),
        "sorted": Step(parts, shape, optimizer, points, clock),
    }
    print(f"one large bfloat16 product: {rate / 1e9:.0f} GFLOP/s; {given.train.tokens_per_pass} tokens a pass")
    for step in steps.values():
        step()
    times = dict(zip(steps, alternate(list(steps.values()), rounds), strict=True))
    figures: dict[str, Any] = {"machine_flops_s": round(rate), "tokens_per_pass": given.train.tokens_per_pass}
    figures["clock"] = clock.__name__
    checks = {}
    for kind, step in steps.items():
        predicted = [seconds * step.flops / steps["ordinary"].flops for seconds in times["ordinary"]]
        ratio, seconds = paired_ratio(times[kind], predicted), median(times[kind])
        share = step.flops / seconds / rate
        figures[kind] = {
            "seconds": round(seconds, 3),
            "tokens_s": round(step.tokens / seconds),
            "share_of_machine_flops": round(share, 3),
            "of_what_flops_predict": round(ratio, 3),
        }
        print(
            f"{kind:9} {seconds:7.2f} s, {step.tokens / seconds:6.0f} tokens/s, {share:.0%} of the machine's FLOP rate, "
            f"{ratio:.2f}x of what its FLOPs predict from the ordinary step"
        )
        if kind != "ordinary":
            checks[f"{kind} step at most {LIMIT}x of what its FLOPs predict"] = ratio <= LIMIT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    most = weights + memory.bound(model, sampler, given)
    figures |= {"peak_memory_bytes": peak, "weights_and_step_bound_bytes": most}
    print(f"peak memory of the process {peak / 2**30:.2f} GiB; weights and a step at most {most / 2**30:.2f} GiB")
    report(name, figures, checks)


if __name__ == "__main__":
    main()
