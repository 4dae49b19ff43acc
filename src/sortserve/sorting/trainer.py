"""The training loop: passes, updates, the clock, the log, and going on after a kill.

Contract: `train` runs updates until the recipe's count or the clock's end, saves the run every few minutes and when it is
asked to stop, and logs to training.jsonl. With a count of updates a resumed run computes what the uninterrupted one would
have; with minutes the schedule follows the time spent training, that of a killed run included, so it ends annealed.
"""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from sortserve.engine.errors import SortingError
from sortserve.sorting import saved_run
from sortserve.sorting.data import Packed, inputs_and_targets
from sortserve.sorting.lora import RankPrefix
from sortserve.sorting.losses import head_loss
from sortserve.sorting.nested import SubModels, exit_states
from sortserve.sorting.optimizer import Optimizer, rate_at
from sortserve.sorting.recipe import Recipe
from sortserve.sorting.sampler import Pass, Sampler


@dataclass
class Parts:
    """What is trained, on what, and where it is kept."""

    model: Any
    sampler: Sampler
    packed: Packed
    bos: int | None
    recipe: Recipe
    out: Path
    fingerprint: str
    """Of recipe, text and model: an unfinished run of another one is refused."""
    accelerator: Accelerator
    ranks: RankPrefix | None = None
    checkpointed: bool = False
    """Layers are computed again in the backward pass instead of kept."""

    @property
    def unfinished(self) -> Path:
        """Where the run is kept until its result is in place."""
        return self.out / "unfinished"

    @property
    def log(self) -> Path:
        """A line every few updates."""
        return self.unfinished / "training.jsonl"


@dataclass
class Progress:
    """Where the run is; all of it is saved."""

    update: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Spent training, in all processes that took part."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sub-model -> [sum of losses, passes] since the last line of the log."""
    done: bool = False


def train_step(parts: Parts, optimizer: Optimizer, update: int, rate: float) -> dict[str, list[float]]:
    """One update. Returns sub-model -> losses of its passes, in nats per token."""
    recipe, found = parts.recipe.train, defaultdict(list)
    passes = parts.sampler.passes_of(update)
    long = recipe.long_every > 0 and update % recipe.long_every == recipe.long_every - 1
    window = recipe.long_window if long else recipe.window
    for place, one in enumerate(passes):
        windows = parts.packed.windows(update * len(passes) + place, recipe.tokens_per_pass, window)
        each = run_pass(parts, one, windows.to(parts.accelerator.device))
        optimizer.collect()
        for depth, loss in zip(one.chosen.exits, each.tolist(), strict=True):
            if not math.isfinite(loss):
                raise SortingError(f"update {update}: the loss of d{depth} is {loss}; what was saved before is whole")
            found[f"d{depth}-w{one.chosen.width}"].append(loss)
    optimizer.step(rate, len(passes))
    return found


def run_pass(parts: Parts, one: Pass, windows: Tensor) -> Tensor:
    """Forward and backward of one pass; the exits' losses. Self-distillation: SoFT's exits learn from the deepest exit of
    their own pass, which costs nothing; a single sub-model learns from the full model, which costs a forward pass."""
    if parts.ranks is not None and one.rank:
        parts.ranks.rank = one.rank
    inputs, targets = inputs_and_targets(windows, parts.bos)
    model, method = parts.model, parts.recipe.method
    teacher, full = None, SubModels(parts.sampler.exits[-1:], parts.sampler.widths[-1])
    if method.distill and method.kind == "sorted" and (one.chosen.exits, one.chosen.width) != (full.exits, full.width):
        with torch.no_grad():
            teacher = exit_states(model, inputs, full)[-1].flatten(0, 1)
    states = exit_states(model, inputs, one.chosen, parts.checkpointed).flatten(1, 2)
    loss = head_loss(states, model.lm_head.weight, targets.reshape(-1), one.scale, method.distill, teacher)
    parts.accelerator.backward(loss.total)
    return loss.each


class Clock:
    """How far the run is, in [0, 1]: by updates, or by seconds of training."""

    def __init__(self, updates: int, seconds: float | None, progress: Progress) -> None:
        self._updates, self._seconds, self._before = updates, seconds, progress.seconds
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent training, before this process too."""
        return self._before + time.monotonic() - self._began

    def progress(self, update: int) -> float:
        """1 or more: the run is over."""
        if self._seconds is None:
            return update / self._updates
        by_updates = update / self._updates if self._updates else 0.0
        return max(by_updates, self.seconds / self._seconds)


def train(
    parts: Parts, updates: int, seconds: float | None, stop: Callable[[], bool] = lambda: False
) -> tuple[Progress, Optimizer]:
    """Train until `updates` (0: no limit) or `seconds` of training are over, or `stop()`; saves the run at the end too.

    Raises SortingError for an unfinished run that is damaged or of another recipe, and for losses that are no numbers.
    """
    named = [(n, p) for n, p in parts.model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(named, parts.recipe.train)
    progress = resume(parts, optimizer)
    clock = Clock(updates, seconds, progress)
    saved_at = logged_at = clock.seconds
    logged_tokens = progress.tokens
    bar = tqdm(total=updates or None, initial=progress.update, unit="update", mininterval=_interval(), smoothing=0.05)
    with bar:
        over = clock.progress(progress.update) >= 1.0
        while not over and not stop():
            rate = rate_at(clock.progress(progress.update), parts.recipe.train)
            for name, losses in train_step(parts, optimizer, progress.update, rate).items():
                old = progress.sums.get(name, [0.0, 0.0])
                progress.sums[name] = [old[0] + sum(losses), old[1] + len(losses)]
            progress.update += 1
            progress.tokens += parts.recipe.train.tokens_per_pass * parts.recipe.method.passes
            progress.seconds = clock.seconds
            bar.update()
            over = clock.progress(progress.update) >= 1.0
            if over or progress.update % parts.recipe.train.log_every == 0:
                speed = (progress.tokens - logged_tokens) / max(1e-9, progress.seconds - logged_at)
                logged_at, logged_tokens = progress.seconds, progress.tokens
                _log(parts.log, bar, progress, rate, speed)
            if progress.seconds - saved_at > 60 * parts.recipe.train.save_minutes:
                saved_at = progress.seconds
                _save(parts, optimizer, progress, must=False)
        progress.done = over
    _save(parts, optimizer, progress, must=True)
    return progress, optimizer


def resume(parts: Parts, optimizer: Optimizer) -> Progress:
    """Take up the unfinished run in the output folder, if there is one; its log is cut to what is taken up."""
    path = parts.log
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = saved_run.load_newest(parts.unfinished)
    if kept is None:
        path.write_text("", encoding="utf-8")
        return Progress()
    facts = dict(kept.facts)
    if facts.pop("fingerprint") != parts.fingerprint:
        raise SortingError(f"{parts.out} holds an unfinished run of another recipe, text or model; --fresh starts anew")
    facts.pop("sha256")
    optimizer.restore(kept.tensors)
    progress = Progress(**facts)
    _cut_log(path, progress.update)
    print(f"going on after update {progress.update}, {progress.seconds:.0f} s of training", file=sys.stderr)
    return progress


def _save(parts: Parts, optimizer: Optimizer, progress: Progress, must: bool) -> None:
    """A full disk in the middle of a run costs a warning: the older save is whole, and the next one may find room."""
    facts = {**vars(progress), "fingerprint": parts.fingerprint}
    try:
        saved_run.save(parts.unfinished, saved_run.SavedRun(optimizer.state(), facts))
    except OSError as error:
        if must:
            raise SortingError(f"the run could not be saved: {error}; what was saved before is whole") from error
        tqdm.write(f"not saved: {error}; training goes on", file=sys.stderr)


def _log(path: Path, bar: Any, progress: Progress, rate: float, speed: float) -> None:
    each = {name: round(total / count, 5) for name, (total, count) in sorted(progress.sums.items(), key=_by_grid)}
    line: dict[str, Any] = {"update": progress.update, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
    line |= {"rate": round(rate, 6), "tokens_s": round(speed), "loss": each}
    try:
        with path.open("a", encoding="utf-8") as log:
            print(json.dumps(line), file=log)
    except OSError as error:
        tqdm.write(f"not logged: {error}; training goes on", file=sys.stderr)
    bar.set_postfix_str(f"{speed:.0f} tokens/s " + " ".join(f"{name} {loss:.3f}" for name, loss in each.items()))
    progress.sums = {}


def _cut_log(path: Path, update: int) -> None:
    """Leave the lines up to `update`; what a kill or a full disk cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _by_grid(item: tuple[str, list[float]]) -> tuple[int, ...]:
    return tuple(int(part[1:]) for part in item[0].split("-"))


def _interval() -> float:
    """Seconds between two drawings of the bar: few where it goes to a file."""
    return 0.5 if sys.stderr.isatty() else 30.0
