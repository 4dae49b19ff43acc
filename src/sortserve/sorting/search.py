"""EvoPress: evolutionary search for a sub-model of a given budget (arXiv 2410.14649), fitness = KL to the full model.

A sub-model is a genome: per layer a level of the FFN (an index into ascending widths, 0 among them where an FFN may be
dropped) and whether attention stays. A mutation is 1 to 3 level switches, each of which lowers one gene and raises
another one of the same kind, so that the budget stays; few switches are likelier (the least of two draws). Each
generation makes offspring of one parent and selects in rounds on ever more text; the parent joins the last round, so the
answer is never worse there than the best of the starts. With the levels (0, full) this is the paper's depth pruning.

Per-layer errors do not add up, so nothing here ranks layers by themselves; the starts may.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import SubModel

Fitness = Callable[[SubModel, int], float]
"""Of a sub-model in round 0, 1, ...: lower is better; later rounds look at more text."""


@dataclass(frozen=True, slots=True)
class Genome:
    """Level of each layer's FFN, and which layers attend."""

    levels: tuple[int, ...]
    attend: tuple[bool, ...]


@dataclass(frozen=True)
class Space:
    """What genes may be: `widths` ascending, the last one the full width; attention may be dropped or not."""

    widths: tuple[int, ...]
    num_layers: int
    drop_attention: bool = False

    def submodel(self, genome: Genome) -> SubModel:
        """The sub-model of full depth that a genome means."""
        skipped = [layer for layer, on in enumerate(genome.attend) if not on]
        return SubModel.make(self.num_layers, [self.widths[level] for level in genome.levels], skipped)

    def genome(self, submodel: SubModel) -> Genome:
        """The genome of a sub-model. Raises SortingError if it is not of this space."""
        if submodel.depth != self.num_layers or not set(submodel.widths) <= set(self.widths):
            raise SortingError(f"{submodel} is not made of {self.num_layers} layers with widths {self.widths}")
        on = tuple(layer not in submodel.skip_attention for layer in range(self.num_layers))
        return Genome(tuple(self.widths.index(width) for width in submodel.widths), on)

    def neurons(self, genome: Genome) -> int:
        """FFN neurons of all layers together."""
        return sum(self.widths[level] for level in genome.levels)


@dataclass(frozen=True)
class Settings:
    """How hard to search. `survivors[i]` are left after round i on round i's text; the last round ends with one."""

    generations: int = 20
    offspring: int = 8
    survivors: tuple[int, ...] = (2,)
    most_switches: int = 3
    seed: int = 0
    seconds: float = float("inf")  # ends early at this time; what was found by then is kept

    def __post_init__(self) -> None:
        counts = (self.offspring, *self.survivors)
        if min(self.generations, *counts) < 1 or list(counts) != sorted(counts, reverse=True):
            raise SortingError(f"offspring and survivors are {counts}: must fall, and be at least 1")


@dataclass(frozen=True)
class Found:
    """The best sub-model, its fitness in the last round, and what it took."""

    submodel: SubModel
    fitness: float
    start_fitness: tuple[float, ...]  # of the starts, in their order
    generations: int
    evaluations: int


def evolve(
    space: Space,
    starts: Sequence[SubModel],
    fitness: Fitness,
    settings: Settings,
    progress: Callable[[str], None] | None = None,
    adopted: Callable[[SubModel], None] | None = None,
) -> Found:
    """Search from the best of `starts`, which should have one budget; `adopted` hears of every new parent.

    Raises SortingError without starts.
    """
    if not starts:
        raise SortingError("a search needs at least one sub-model to start from")
    rng = random.Random(settings.seed)
    ends = time.monotonic() + settings.seconds
    last_round = len(settings.survivors)
    evaluations = 0

    def evaluate(genome: Genome, round_number: int) -> float:
        nonlocal evaluations
        evaluations += 1
        return fitness(space.submodel(genome), round_number)

    genomes = [space.genome(start) for start in starts]
    start_fitness = [evaluate(genome, last_round) for genome in genomes]
    best = min(range(len(genomes)), key=start_fitness.__getitem__)
    parent, parent_fitness = genomes[best], start_fitness[best]
    budget = space.neurons(parent)
    seen = {parent}
    generation = 0
    if adopted is not None:
        adopted(space.submodel(parent))
    while generation < settings.generations and time.monotonic() < ends:
        offspring = _offspring(space, parent, budget, settings, rng, seen)
        if not offspring:
            break  # every neighbour was looked at
        for round_number, survivors in enumerate(settings.survivors):
            if len(offspring) > survivors:
                ranked = sorted((evaluate(child, round_number), place) for place, child in enumerate(offspring))
                offspring = [offspring[place] for _, place in ranked[:survivors]]
        finals = [(evaluate(child, last_round), place) for place, child in enumerate(offspring)]
        child_fitness, place = min(finals)
        if child_fitness < parent_fitness:
            parent, parent_fitness = offspring[place], child_fitness
            if adopted is not None:
                adopted(space.submodel(parent))
        generation += 1
        if progress is not None:
            progress(f"generation {generation} of {settings.generations}: KL {parent_fitness:.4f}")
    return Found(space.submodel(parent), parent_fitness, tuple(start_fitness), generation, evaluations)


def mutate(space: Space, genome: Genome, switches: int, budget: int, rng: random.Random) -> Genome:
    """So many level switches, within `budget` neurons; the genome itself if there is nothing to switch."""
    for _ in range(switches):
        kinds = [kind for kind in ("ffn", "attention") if _can_switch(space, genome, kind)]
        if not kinds:
            return genome
        genome = (
            _switch_ffn(space, genome, budget, rng) if rng.choice(kinds) == "ffn" else _switch_attention(genome, rng)
        )
    return genome


def _offspring(
    space: Space, parent: Genome, budget: int, settings: Settings, rng: random.Random, seen: set[Genome]
) -> list[Genome]:
    """New genomes, none of which was looked at before; fewer than asked for where the space runs out."""
    children: list[Genome] = []
    for _ in range(50 * settings.offspring):
        switches = min(rng.randint(1, settings.most_switches), rng.randint(1, settings.most_switches))
        child = mutate(space, parent, switches, budget, rng)
        if child not in seen:
            seen.add(child)
            children.append(child)
        if len(children) == settings.offspring:
            break
    return children


def _can_switch(space: Space, genome: Genome, kind: str) -> bool:
    if kind == "attention":
        return space.drop_attention and len(set(genome.attend)) == 2
    top = len(space.widths) - 1
    lowered = [layer for layer, level in enumerate(genome.levels) if level > 0]
    raised = [layer for layer, level in enumerate(genome.levels) if level < top]
    return bool(lowered and raised and len({*lowered, *raised}) > 1)


def _switch_ffn(space: Space, genome: Genome, budget: int, rng: random.Random) -> Genome:
    """One layer down a level, another one up; by several where levels are fine. They may be unequal steps, so the sum may
    fall, but never pass the budget (a few tries; else nothing changes)."""
    top = len(space.widths) - 1
    most = 1 + top // 5
    for _ in range(20):
        step = min(rng.randint(1, most), rng.randint(1, most))
        down = rng.choice([layer for layer, level in enumerate(genome.levels) if level > 0])
        raisable = [layer for layer, level in enumerate(genome.levels) if level < top and layer != down]
        if not raisable:
            continue
        up = rng.choice(raisable)
        levels = list(genome.levels)
        step = min(step, levels[down], top - levels[up])
        levels[down] -= step
        levels[up] += step
        child = replace(genome, levels=tuple(levels))
        if space.neurons(child) <= budget:
            return child
    return genome


def _switch_attention(genome: Genome, rng: random.Random) -> Genome:
    attend = list(genome.attend)
    drop = rng.choice([layer for layer, on in enumerate(attend) if on])
    restore = rng.choice([layer for layer, on in enumerate(attend) if not on])
    attend[drop], attend[restore] = False, True
    return replace(genome, attend=tuple(attend))
